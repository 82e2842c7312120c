"""`python -m benchmarks.arrivals`: whether the open loop sends what it promised, when it promised.

For each arrival process and rate, with a server that answers at once and with one that takes three seconds: the rate
that was achieved, the coefficient of variation of the gaps between sends (1 for Poisson, 0 for constant), and how late
requests were sent. The client has one core, the reference server another. For each rate also the same of an alarm that
sends nothing: what the timers of this machine allow.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit

import numpy as np
from numpy.typing import ArrayLike

from experiment.environment import describe
from loadtest import records
from loadtest.alarm import Alarm
from loadtest.reference.probe import reference
from loadtest.selfcheck import go_first

LOCUSTFILE = Path(records.__file__).with_name("locustfile.py")
QUICK_SECONDS, SLOW_SECONDS = 0.001, 3.0
OUTPUT_TOKENS = 1


@dataclass(frozen=True)
class Result:
    """What one run sent; times in seconds. `planned` is the coefficient of variation of the schedule itself."""

    arrival: str
    rate: float
    server_seconds: float
    requests: int
    failed: int
    rate_error: float
    planned_variation: float
    variation: float
    lateness_p50: float
    lateness_p99: float
    lateness_max: float


def measure(arrival: str, rate: float, server_seconds: float, seconds: float, cores: tuple[int, int]) -> Result:
    """Run the load generator once for `seconds` at `rate` requests per second."""
    with (
        tempfile.TemporaryDirectory(prefix="arrivals-") as folder,
        reference(cores[1], server_seconds, 0.001) as url,
    ):
        options = {
            "arrival": arrival,
            "rate": rate,
            "duration": seconds,
            "workload": "synthetic",
            "input-lengths": "constant",
            "input-mean": 8,
            "output-lengths": "constant",
            "output-mean": OUTPUT_TOKENS,
            "model": "reference",
            "hf-url": url,
            "records": f"{folder}/records.arrow",
        }
        command = ["taskset", "-c", str(cores[0]), sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "HF"]
        command += ["--headless", "--only-summary", *(f"--{name}={value}" for name, value in options.items())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
        if done.returncode:
            raise RuntimeError(f"the load generator ended with {done.returncode}: {done.stderr[-500:]}")
        return analyse(arrival, rate, server_seconds, list(records.read(Path(folder) / "records.arrow")))


def measure_alarm(rate: float, seconds: float, core: int) -> Result:
    """Wait for each moment of a constant schedule, alone on the core, and do nothing."""
    with get_context("spawn").Pool(1, partial(os.sched_setaffinity, 0, {core})) as pool:
        due, rang = np.array(pool.apply(ring, (rate, seconds))) / 1e9
    late = np.quantile(rang - due, (0.5, 0.99, 1)).tolist()
    return Result("alarm", rate, 0, len(due), 0, 0, variation(due), variation(rang), *late)


def ring(rate: float, seconds: float) -> tuple[list[int], list[int]]:
    """When an alarm should have rung and when it did (CLOCK_MONOTONIC ns)."""
    begun = time.monotonic_ns() + 100_000_000
    due = [begun + round(number * 1e9 / rate) for number in range(int(rate * seconds))]
    rang = []
    go_first()
    with closing(Alarm()) as alarm:
        for moment in due:
            alarm.wait_until(moment)
            rang.append(time.monotonic_ns())
    return due, rang


def analyse(arrival: str, rate: float, server_seconds: float, kept: Sequence[records.Record]) -> Result:
    """Figures of one run from its records."""
    scheduled = np.array(sorted(record.scheduled_ns or 0 for record in kept)) / 1e9
    sent = np.array(sorted(record.sent_ns for record in kept)) / 1e9
    late = np.array([record.late_seconds for record in kept])
    # Against the schedule: a seeded Poisson process has not exactly rate x seconds arrivals.
    error = (len(sent) - 1) / (sent[-1] - sent[0]) / ((len(scheduled) - 1) / (scheduled[-1] - scheduled[0])) - 1
    return Result(
        *(arrival, rate, server_seconds, len(kept), sum(bool(record.error) for record in kept), float(error)),
        *(variation(scheduled), variation(sent)),
        *(float(value) for value in np.quantile(late, (0.5, 0.99, 1))),
    )


def variation(times: ArrayLike) -> float:
    """Coefficient of variation of the gaps: standard deviation over mean."""
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean())


def line(result: Result) -> str:
    """A line of the table."""
    late = ", ".join(f"{1e3 * getattr(result, f'lateness_{at}'):.2f}" for at in ("p50", "p99", "max"))
    return (
        f"{result.arrival:<10}{result.rate:>8g}{result.server_seconds:>10g}{result.requests:>10}{result.failed:>8}"
        f"{result.rate_error:>+12.3%}{result.planned_variation:>10.3f}{result.variation:>9.3f}  {late}"
    )


def main() -> int:
    """Run the benchmark; what was measured before an interruption is reported."""
    parser = argparse.ArgumentParser(prog="benchmarks.arrivals", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arrivals", default="poisson,constant", metavar="NAMES")
    parser.add_argument("--rates", default="50,200,1000", metavar="REQUESTS_PER_SECOND")
    parser.add_argument("--seconds", type=float, default=30, help="length of each run")
    parser.add_argument("--cores", default="1,0", metavar="CLIENT,SERVER")
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON")
    given = parser.parse_args()
    client, server = map(int, given.cores.split(","))
    setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    results: list[Result] = []
    print("arrival     rate/s  server s  requests  failed  rate error   planned  CV gaps  late ms p50, p99, max")
    try:
        for rate in map(float, given.rates.split(",")):
            runs = [partial(measure_alarm, rate, given.seconds, client)]
            for arrival, answer in itertools.product(given.arrivals.split(","), (QUICK_SECONDS, SLOW_SECONDS)):
                runs.append(partial(measure, arrival, rate, answer, given.seconds, (client, server)))
            for run in runs:
                results.append(run())
                print(line(results[-1]), flush=True)
    except KeyboardInterrupt:
        return 130
    finally:
        if given.out:
            found = describe() | {"results": [asdict(result) for result in results]}
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
