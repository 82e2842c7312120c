"""The host side: what the servers' processes use, and what the monitor itself does."""

import time
from dataclasses import dataclass

from monitor.fast import MAX_SERVERS
from monitor.gpu import Rates
from monitor.processes import Processes
from monitor.sampler import Sampler, Schedule, Source
from monitor.timeline import Series, Timeline

HOST_HZ, DETAILS_HZ = 10, 1
LATENESS = Series("monitor_sample_lateness_seconds", detail="host")
CPU = Series("monitor_cpu_seconds_total")


@dataclass(frozen=True)
class Host:
    """The samplers of the host and what they tell of themselves."""

    source: Source
    samplers: list[Sampler]
    processes: Processes


def make_host(timeline: Timeline, processes: Processes, rates: Rates) -> Host:
    """Sample memory and CPU of the processes, once a second their threads and files, and in between what is shared."""
    hz = min(rates.hz, HOST_HZ)
    # Five metrics of each server and our lateness; two of each and our CPU.
    often = timeline.ring("host", rates.seconds * hz, 5 * MAX_SERVERS + 1)
    seldom = timeline.ring("host-details", rates.seconds * DETAILS_HZ, 2 * MAX_SERVERS + 1)
    often.keep(LATENESS)
    seldom.keep(CPU)

    def read(lateness: float) -> bool:
        often.append(processes.read() | {LATENESS: lateness})
        return True

    def read_details(_: float) -> bool:
        seldom.append(processes.read_details() | {CPU: time.process_time()})
        return True

    main = Schedule(hz, read)
    samplers = [
        Sampler("host", main.steps()),
        Sampler("host-details", Schedule(DETAILS_HZ, read_details).steps()),
        # The dearest reading: an eighth of what all sampling may take.
        Sampler("host-shared", processes.read_shared(rates.max_cpu / 8)),
    ]
    return Host(Source("host", main, samplers), samplers, processes)
