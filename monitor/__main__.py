"""Starts the monitor: `python -m monitor`."""

import errno
import faulthandler
import logging
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import CliApp

from monitor.app import Monitor, make_app
from monitor.gpu import Rates
from monitor.gpus import Gpus
from monitor.host import make_host
from monitor.processes import Processes
from monitor.settings import VARIABLES, Settings, unknown_variables
from monitor.timeline import Timeline


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM or SIGINT; answer the exit code: 0, 1 when the port cannot be had, 2 for bad settings."""
    try:
        settings = CliApp.run(Settings, cli_args=list(argv))
    except ValidationError as error:
        for problem in error.errors():
            print(f"monitor: {complaint(problem)}", file=sys.stderr)
        return 2
    if unknown := unknown_variables(os.environ):
        print(f"monitor: {', '.join(unknown)}: no such setting; there are {', '.join(VARIABLES)}", file=sys.stderr)
        return 2
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        print(f"monitor: {refusal(error, settings)}", file=sys.stderr)
        return 1
    if sys.stderr:
        # The driver's library runs in this process: if it crashes, what each thread did is told.
        faulthandler.enable()
    favour()
    serve(settings, listener)
    return 0


def complaint(problem: ErrorDetails) -> str:
    """Say in one line what is wrong with a setting, or with several together."""
    if not problem["loc"]:
        return problem["msg"].removeprefix("Value error, ")
    option = str(problem["loc"][0]).replace("_", "-")
    return f"--{option}: {problem['input']}: {problem['msg']}"


def favour() -> None:
    """Give the threads that answer requests a large share of a busy core, where Linux lets us (root or CAP_SYS_NICE).

    The samplers go first (see monitor.sampler), but wait for a thread that was put aside while it held the interpreter.
    With real-time priority for all threads, a download of the timeline would keep the servers from a core.
    """
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -19)


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before anything else is started; raises OSError."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def refusal(error: OSError, settings: Settings) -> str:
    """Say in one line why the port cannot be had and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"port {settings.port} of {settings.host} is in use: free it, or choose another with --port (0: any)"
    return f"cannot listen on port {settings.port} of {settings.host}: {error.strerror}; see --host and --port"


def serve(settings: Settings, listener: socket.socket) -> None:
    """Sample and serve until a signal comes."""
    logging.basicConfig(format="monitor: %(message)s", level=logging.WARNING)
    # A thread that computes gives way to a sampler after this many seconds.
    sys.setswitchinterval(0.0005)
    monitor = make_monitor(settings)
    line = banner(settings, listener, monitor)
    # aiohttp calls `print` once it answers and handles signals: whoever waits for the line can rely on both.
    web.run_app(
        make_app(monitor),
        sock=listener,
        access_log=None,
        shutdown_timeout=1,
        print=lambda _: print(line, flush=True),
    )


def make_monitor(settings: Settings) -> Monitor:
    """Put the parts together."""
    timeline, processes = Timeline(), Processes(stack=os.environ.get("HEADROOM_STACK", ""))
    rates = Rates(settings.hz, settings.max_cpu, settings.minutes * 60)
    gpus = Gpus(timeline, processes, rates)
    host = make_host(timeline, processes, rates, beside_gpus=bool(gpus.found))
    return Monitor(timeline, host, gpus, settings.hz)


def banner(settings: Settings, listener: socket.socket, monitor: Monitor) -> str:
    """Say in one line where the monitor answers, what it watches, and why it watches no GPU."""
    host, port = listener.getsockname()[:2]
    place = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    found, reason = monitor.gpus.found, monitor.gpus.reason
    gpus = ", ".join(f"GPU {gpu.gpu} ({gpu.identity.name})" for gpu in found.values()) or "no GPU"
    hz = settings.hz if found else monitor.host.source.wanted_hz
    return (
        f"monitor: {place} watches processes with HEADROOM_SERVER in their environment and {gpus}"
        f"{f' ({reason})' if reason else ''}, {hz} times a second, and keeps {settings.minutes} minutes in "
        f"{monitor.timeline.size_bytes / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
