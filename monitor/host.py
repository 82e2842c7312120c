"""The host side: what the servers' processes use, and what the monitor itself does."""

import time
from dataclasses import dataclass

from monitor.fast import MAX_SERVERS
from monitor.gpu import Rates
from monitor.processes import Processes
from monitor.sampler import Governor, Sampler, Schedule, Source
from monitor.timeline import Series, Timeline

DETAILS_HZ = 1
# How often the processes are read, and of all that sampling may take, what that may, and what reading the memory that
# they share may. Where there are GPUs it is their memory that matters.
ALONE, BESIDE_GPUS = (10, 0.9, 0.1), (5, 0.1, 0.05)
LATENESS = Series("monitor_sample_lateness_seconds", detail="host")
MISSED = Series("monitor_samples_missed", detail="host")
CPU = Series("monitor_cpu_seconds_total")


@dataclass(frozen=True)
class Host:
    """The samplers of the host and what they tell of themselves."""

    source: Source
    samplers: list[Sampler]
    processes: Processes


def make_host(timeline: Timeline, processes: Processes, rates: Rates, *, beside_gpus: bool) -> Host:
    """Sample memory and CPU of the processes, once a second their threads and files, and in between what is shared."""
    most_hz, share, shared = BESIDE_GPUS if beside_gpus else ALONE
    hz = min(rates.hz, most_hz)
    # Five metrics of each server, our lateness and what was missed; two of each and our CPU.
    often = timeline.ring("host", rates.seconds * hz, 5 * MAX_SERVERS + 2)
    seldom = timeline.ring("host-details", rates.seconds * DETAILS_HZ, 2 * MAX_SERVERS + 1)
    often.keep(LATENESS)
    often.keep(MISSED)
    seldom.keep(CPU)

    def read(lateness: float) -> bool:
        missed = {MISSED: main.behind} if main.behind else {}
        often.append(processes.read() | {LATENESS: lateness} | missed)
        return True

    def read_details(_: float) -> bool:
        governor.review(time.monotonic_ns(), host.cpu_seconds)
        seldom.append(processes.read_details() | {CPU: time.process_time()})
        return True

    governor = Governor(rates.max_cpu * share, hz, "processes on the host")
    main = Schedule(hz, read, governor)
    host = Sampler("host", main.steps())
    samplers = [
        host,
        Sampler("host-details", Schedule(DETAILS_HZ, read_details).steps()),
        # The dearest reading.
        Sampler("host-shared", processes.read_shared(rates.max_cpu * shared)),
    ]
    return Host(Source("host", main, samplers), samplers, processes)
