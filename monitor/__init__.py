"""Samples the memory of GPUs and of server processes, and serves the samples over HTTP.

Knows nothing of servers but their names: a process belongs to server NAME when its environment holds
HEADROOM_SERVER=NAME. Where that and the monitor's own name a HEADROOM_STACK, as those of a comparison do, it is the same.
"""
