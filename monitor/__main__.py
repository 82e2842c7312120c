"""Starts the monitor: `python -m monitor`."""

import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter
from pydantic import ValidationError
from pydantic_settings import CliApp

from monitor import nvml
from monitor.app import Monitor, make_app
from monitor.collector import TimelineCollector
from monitor.processes import Processes
from monitor.sampler import Sampler, Task, samples
from monitor.settings import VARIABLES, Settings, unknown_variables
from monitor.timeline import Readings, Series, Timeline


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM or SIGINT; answer the exit code: 0, 1 when the port cannot be had, 2 for bad settings."""
    try:
        settings = CliApp.run(Settings, cli_args=list(argv))
    except ValidationError as error:
        for problem in error.errors():
            option = str(problem["loc"][0]).replace("_", "-")
            print(f"monitor: --{option}: {problem['input']}: {problem['msg']}", file=sys.stderr)
        return 2
    if unknown := unknown_variables(os.environ):
        print(f"monitor: {', '.join(unknown)}: no such setting; there are {', '.join(VARIABLES)}", file=sys.stderr)
        return 2
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        print(f"monitor: {refusal(error, settings)}", file=sys.stderr)
        return 1
    go_first()
    serve(settings, listener)
    return 0


def go_first() -> None:
    """Ask Linux to run all our threads before other processes, where it may (root or CAP_SYS_NICE).

    Servers that spin while they wait, as vLLM's do, would else leave gaps of seconds in the samples of a machine with
    few cores. What the samples miss shows in monitor_sample_lateness_seconds.
    """
    if hasattr(os, "sched_setscheduler"):
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


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
    monitor = make_monitor(settings, nvml.open_devices())
    line = banner(settings, listener, monitor.devices)
    # aiohttp calls `print` once it answers and handles signals: whoever waits for the line can rely on both.
    web.run_app(
        make_app(monitor),
        sock=listener,
        access_log=None,
        shutdown_timeout=1,
        print=lambda _: print(line, flush=True),
    )


def make_monitor(settings: Settings, devices: nvml.Devices) -> Monitor:
    """Put the parts together: a sampler for the host, one for its shared memory, and one for each GPU."""
    registry = CollectorRegistry()
    errors = Counter("headroom_monitor_nvml_errors", "NVML calls that failed", ["call"], registry=registry)
    for call in nvml.CALLS:
        errors.labels(call)
    timeline = Timeline(settings.minutes * 60 * settings.hz)
    processes = Processes()

    def read_gpu(device: nvml.Device) -> Readings:
        return nvml.read(device, processes.servers(), lambda call: errors.labels(call).inc())

    tasks = [host_task(processes), *(gpu_task(device.index, partial(read_gpu, device)) for device in devices.found)]
    samplers = [Sampler(task.name, samples(task, timeline, settings.hz)) for task in tasks]
    samplers.append(Sampler("shared", processes.read_shared(settings.max_cpu)))
    TimelineCollector(timeline, devices.found, registry)
    return Monitor(timeline, samplers, devices, registry, settings.hz)


def host_task(processes: Processes) -> Task:
    """Name what is sampled on every machine; the monitor's CPU counts all of it, its HTTP server included."""
    lateness, cpu = Series("monitor_sample_lateness_seconds"), Series("monitor_cpu_seconds_total")
    return Task("host", processes.read, lateness, cpu, cpu_clock=time.process_time)


def gpu_task(gpu: int, read: Callable[[], Readings]) -> Task:
    """Name what is sampled of a GPU."""
    lateness, cpu = Series("monitor_sample_lateness_seconds", gpu=gpu), Series("monitor_gpu_cpu_seconds_total", gpu=gpu)
    return Task(f"gpu{gpu}", read, lateness, cpu)


def banner(settings: Settings, listener: socket.socket, devices: nvml.Devices) -> str:
    """Say in one line where the monitor answers, what it watches, and why it watches no GPU."""
    host, port = listener.getsockname()[:2]
    place = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    gpus = ", ".join(f"GPU {device.index} ({device.name})" for device in devices.found) or "no GPU"
    reason = f" ({devices.reason})" if devices.reason else ""
    return (
        f"monitor: {place} watches processes with HEADROOM_SERVER in their environment and {gpus}{reason}, "
        f"{settings.hz} times a second, and keeps {settings.minutes} minutes"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
