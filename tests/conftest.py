"""What all tests share."""

import signal

from hypothesis import settings

# Machines are shared: how long an example takes says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell ignores Ctrl-C for what it starts in the background, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
