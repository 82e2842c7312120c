"""`python -m loadtest.calibrate`: up to which rate this machine's load generator tells the truth.

It sends growing loads to the reference server, each on a core of its own, and holds what it reports against what the
server says it sent. The rate that was found is kept; runs that go past it say so.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit

from loadtest import records
from loadtest.reference.probe import ARRIVAL_SECONDS, ITL_LIMIT, WARM_UP, Probe, Seen, compare, reference, stamps

KEPT = Path.home() / ".cache" / "headroom" / "calibration.json"
TTFT_SECONDS, ITL_SECONDS, TOKENS = 0.05, 0.02, 100
TTFT_LIMIT = 0.001
LEAST_STREAMS, MOST_STREAMS = 16, 4096
RESOLUTION = 0.125
TRIES = 2
LOAD_SECONDS = 120
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
FAILED = 1


class CalibrationError(Exception):
    """The load generator did not run; the message says why."""


@dataclass(frozen=True)
class OwnLoad:
    """Requests in an open loop with constant gaps, `rate` a second, each of `tokens` output tokens."""

    url: str
    requests: int
    rate: float
    tokens: int
    out: Path

    def command(self) -> list[str]:
        """What sends it."""
        options = {
            "workload": "synthetic",
            "input-lengths": "constant",
            "input-mean": 8,
            "output-lengths": "constant",
            "output-mean": self.tokens,
            "arrival": "constant",
            "rate": self.rate,
            "requests": self.requests,
            "model": "reference",
            "hf-url": self.url,
            "records": self.out / "records.arrow",
        }
        locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "HF", "--headless", "--only-summary"]
        return locust + [f"--{name}={value}" for name, value in options.items()]


def read_seen(out: Path) -> Iterator[Seen]:
    """What the records say, in the order of sending."""
    for record in sorted(records.read(out / "records.arrow"), key=lambda record: record.sent_ns):
        ttft, itl = record.ttft_seconds, record.tpot_seconds
        if ttft is not None and itl is not None:
            gaps = itertools.pairwise(record.chunk_ns)
            yield Seen("", ttft, itl, tuple((later - earlier) / 1e9 for earlier, later in gaps))


def known_limit() -> float | None:
    """Tokens a second that one process was found to be accurate at on this machine; None: not calibrated."""
    try:
        kept = json.loads(KEPT.read_text())
        return float(kept["tokens_per_second"]) if kept["machine"] == _machine() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def calibrate(cores: tuple[int, int]) -> float:
    """Find the rate (tokens/s) and print each load on the way; raises CalibrationError."""
    print(f"{'streams':>8}{'tokens/s':>10}  TTFT p99: client, server (ms)   mean ITL: client, server (ms)")
    good, bad = 0, LEAST_STREAMS
    with reference(cores[1], TTFT_SECONDS, ITL_SECONDS) as url:
        while bad <= MOST_STREAMS and _passes(url, bad, cores[0]):
            good, bad = bad, 2 * bad
        while good and bad <= MOST_STREAMS and bad - good > RESOLUTION * good:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if _passes(url, middle, cores[0]) else (good, middle)
    return good / ITL_SECONDS


def keep(tokens_per_second: float) -> None:
    """Keep the rate for the runs to come."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps({"machine": _machine(), "tokens_per_second": tokens_per_second}) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Calibrate, print the result and keep it; 1 when there is none."""
    parser = argparse.ArgumentParser(prog="headroom calibrate", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--cores", default="1,0", metavar="CLIENT,SERVER", help="the core that each has for itself")
    given = parser.parse_args(arguments).cores
    try:
        client, server = map(int, given.split(","))
    except ValueError:
        parser.error(f"--cores: {given!r}: expected two numbers with a comma between")
    if client == server:
        parser.error(f"--cores: {given!r}: expected two different cores, for the client and the server")
    if missing := {client, server} - os.sched_getaffinity(0):
        parser.error(f"--cores: {given!r}: this process may not use core {', '.join(map(str, sorted(missing)))}")
    setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    try:
        found = calibrate((client, server))
    except CalibrationError as error:
        print(f"headroom: calibrate: {error}", file=sys.stderr)
        return FAILED
    if not found:
        print("headroom: calibrate: not accurate at the least load: is the machine busy?", file=sys.stderr)
        return FAILED
    keep(found)
    print(f"One process of the load generator is accurate here up to {found:,.0f} tokens/s, one token a chunk:")
    print(f"TTFT p99 within {TTFT_LIMIT * 1e3:g} ms, mean ITL within {ITL_LIMIT:.0%}. Kept in {KEPT}.")
    return 0


def _passes(url: str, streams: int, core: int) -> bool:
    """Whether the load generator is right about a load; it may fail once, because machines are shared."""
    for _ in range(TRIES):
        probe = _probe(url, streams, core)
        times = (probe.ttft_p99, probe.server_ttft_p99, probe.itl_mean, probe.server_itl_mean)
        first, server_first, itl, server_itl = (f"{1e3 * seconds:.3f}" for seconds in times)
        verdict = "" if probe.passes(TTFT_LIMIT) else "off" if probe.on_schedule else "the server was late"
        rate = f"{streams / ITL_SECONDS:,.0f}"
        print(f"{streams:>8}{rate:>10}  {first}, {server_first}   {itl}, {server_itl}   {verdict}", flush=True)
        if not verdict:
            return True
    return False


def _probe(url: str, streams: int, core: int) -> Probe:
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        requests = WARM_UP + streams
        load = OwnLoad(url, requests, max(streams, WARM_UP) / ARRIVAL_SECONDS, TOKENS, Path(folder))
        since = stamps(url)[0]["next"]
        command = ["taskset", "-c", str(core), *load.command()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise CalibrationError(f"{streams} streams took more than {LOAD_SECONDS} s") from None
        if done.returncode:
            raise CalibrationError(f"the load generator ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        seen = list(read_seen(Path(folder)))
    summary, *sends = stamps(url, since)
    return compare(requests, seen, sends, (0.0, 0.0), summary["lateness_seconds"]["p99"])


def _machine() -> list[object]:
    """What must be the same for a result to hold."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return [os.uname().nodename, model.partition(": ")[2], os.cpu_count(), sys.version.split()[0]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
