"""`python -m benchmarks.client`: how many tokens a second load generators can take and still tell the truth.

Every client sends the same load to the reference server (`loadtest.reference`) in the same run: requests spread evenly
over two seconds, TTFT 50 ms, a token every 20 ms, one token a chunk. A few requests before them are left out. The
client has one core, the server another. What the client reports is held against the stamps of the server, whose time to
first token is its first send minus its receipt of the request. A C program that only receives (needs `cc`) shows the
limit of the server and the least that a client costs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from statistics import median

from benchmarks.peers import compiled
from benchmarks.peers.drivers import CLIENTS, Load, UnavailableError
from benchmarks.peers.probe import TRIES, Session
from experiment.environment import describe
from loadtest.reference.probe import ARRIVAL_SECONDS, LATENESS_LIMIT, Probe, reference, stamps
from servers.models import resolve

TTFT_SECONDS, ITL_SECONDS = 0.05, 0.02
#: Limits of the difference in p99 of TTFT, in seconds; accuracy is measured at half of the capacity under the first.
TTFT_LIMITS = (0.001, 0.005)
LEAST_STREAMS = 8
CPU_STREAMS, CPU_TRIES = 256, 3


@dataclass(frozen=True)
class Bench:
    """What is measured; `resolution` is how far apart, as a share, the loads are that pass and fail at the end."""

    clients: tuple[str, ...]
    repeats: int
    tokens: int
    most_streams: int
    resolution: float
    cores: tuple[int, int]
    timeout: float


@dataclass
class Result:
    """What one client came to in one repeat; `reason` says why it came to nothing."""

    client: str
    repeat: int
    capacity: dict[float, int] = field(default_factory=dict)
    cpu_per_1000_tokens: float | None = None
    half: Probe | None = None
    probes: list[Probe] = field(default_factory=list)
    reason: str | None = None


def capacity(session: Session, limit: float, most: int, resolution: float) -> int:
    """The most streams that pass: doubled from LEAST_STREAMS until they fail, then halved in between; 0 for none."""
    good, bad = 0, LEAST_STREAMS
    while bad <= most and session.passes(bad, limit):
        good, bad = bad, 2 * bad
    while good and bad <= most and bad - good > max(1, resolution * good):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if session.passes(middle, limit) else (good, middle)
    return good


def measure(bench: Bench, name: str, repeat: int, session: Session) -> Result:
    """Capacity, cost and accuracy of one client."""
    result = Result(name, repeat, probes=session.probes)
    try:
        for limit in TTFT_LIMITS:
            result.capacity[limit] = capacity(session, limit, bench.most_streams, bench.resolution)
        result.cpu_per_1000_tokens = cpu_per_1000_tokens(bench, session)
        result.half = session.probe(max(1, result.capacity[TTFT_LIMITS[0]] // 2))
    except UnavailableError as error:
        result.reason = str(error)
    return result


def cpu_per_1000_tokens(bench: Bench, session: Session) -> float | None:
    """CPU seconds that 1,000 tokens cost, beyond what it costs to start and send one request; medians of some tries."""
    idle, busy = zip(*((session.probe(1), session.probe(CPU_STREAMS)) for _ in range(CPU_TRIES)), strict=True)
    if any(probe.failed for probe in (*idle, *busy)):
        return None
    extra: float = median(probe.cpu for probe in busy) - median(probe.cpu for probe in idle)
    return extra / ((CPU_STREAMS - 1) * bench.tokens) * 1000


class Drain:
    """The C program that takes what the server sends and keeps nothing; raises OSError without a compiler."""

    def __init__(self, bench: Bench, url: str, folder: Path):
        self._bench, self._url, self._program = bench, url, compiled("drain", folder)

    def run(self, streams: int) -> tuple[bool, float]:
        """Take so many streams: whether the server kept its schedule, and our CPU seconds."""
        since = stamps(self._url)[0]["next"]
        sizes = (streams, self._bench.tokens, ARRIVAL_SECONDS)
        command = ["taskset", "-c", str(self._bench.cores[0]), str(self._program), self._url.rpartition(":")[2]]
        command += map(str, sizes)
        done = subprocess.run(command, capture_output=True, text=True, timeout=self._bench.timeout, check=True)
        ended, cpu = done.stdout.split()
        late = stamps(self._url, since)[0]["lateness_seconds"]["p99"]
        return int(ended) == streams and late <= LATENESS_LIMIT, float(cpu)

    def server_limit(self) -> int:
        """The most streams, by doubling, that the server keeps to its schedule."""
        good, streams = 0, LEAST_STREAMS
        while streams <= 2 * self._bench.most_streams:
            if any(self.run(streams)[0] for _ in range(TRIES)):
                good = streams
            streams *= 2
        return good

    def cpu_per_1000_tokens(self) -> float:
        """CPU seconds that 1,000 tokens cost, the median of tries."""
        cpu = median(self.run(CPU_STREAMS)[1] for _ in range(CPU_TRIES))
        return cpu / (CPU_STREAMS * self._bench.tokens) * 1000


def run(bench: Bench, results: list[Result]) -> None:
    """Measure all clients in order, then in the reverse order, by turns; adds to the results."""
    tokenizer = resolve("random:tiny").source
    with (
        tempfile.TemporaryDirectory(prefix="drain-") as folder,
        reference(bench.cores[1], TTFT_SECONDS, ITL_SECONDS) as url,
    ):
        drain = Drain(bench, url, Path(folder))
        alone = tokens_per_second(drain.server_limit())
        print(f"the server alone, within {LATENESS_LIMIT * 1e3:g} ms of its schedule: {alone:,.0f} tokens/s")
        for repeat in range(bench.repeats):
            results.append(Result("epoll in C", repeat, cpu_per_1000_tokens=drain.cpu_per_1000_tokens()))
            for name in bench.clients[:: -1 if repeat % 2 else 1]:
                base = Load(url, 0, bench.tokens, tokenizer, Path())
                session = Session(CLIENTS[name], base, bench.cores[0], bench.timeout)
                results.append(measure(bench, name, repeat, session))
                print(f"repeat {repeat}, {line(name, results[-1:])}", file=sys.stderr, flush=True)


def tokens_per_second(streams: int) -> float:
    """The rate at which so many streams send when all are under way."""
    return streams / ITL_SECONDS


def table(results: Sequence[Result]) -> str:
    """A line for each client: medians over the repeats."""
    titles = [f"tokens/s within {limit * 1e3:g} ms" for limit in TTFT_LIMITS] + ["CPU s/1000 tokens"]
    titles += ["TTFT off by ms p50, p99", "gaps off by ms p50, p99"]
    lines = [f"{'client':<16}" + "".join(f"{title:>26}" for title in titles)]
    names = dict.fromkeys(result.client for result in results)
    return "\n".join([*lines, *(line(name, [r for r in results if r.client == name]) for name in names)])


def line(name: str, results: Sequence[Result]) -> str:
    """What one client came to; a reason in place of figures that it did not come to."""
    cells = [
        _range([tokens_per_second(r.capacity[limit]) for r in results if limit in r.capacity], ",.0f")
        for limit in TTFT_LIMITS
    ]
    cells.append(_range([r.cpu_per_1000_tokens for r in results if r.cpu_per_1000_tokens is not None], ".4f"))
    for what in ("ttft_difference", "gap_difference"):
        found = [getattr(r.half, what) for r in results if r.half and getattr(r.half, what)]
        cells.append(", ".join(f"{median(values) * 1e3:.3f}" for values in zip(*found, strict=True)) or "-")
    reasons = {r.reason for r in results if r.reason}
    if any(not probe.on_schedule for r in results for probe in r.probes):
        reasons.add("the server was late in some loads, which do not count: what passed may be less than the capacity")
    return f"{name:<16}" + "".join(f"{cell:>26}" for cell in cells) + "".join(f"\n  {reason}" for reason in reasons)


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else ""
    return f"{median(values):{form}}{spread}"


def parse(arguments: Sequence[str]) -> tuple[Bench, Path | None]:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.client", description=(__doc__ or "").partition("\n")[0])
    add = partial(parser.add_argument, metavar="...")
    add("--clients", default=",".join(CLIENTS), help="names with commas between")
    add("--repeats", type=int, default=2, help="how often each client is measured; an even number is fair to all")
    add("--tokens", type=int, default=100, help="tokens of each answer")
    add("--most-streams", type=int, default=2048, help="no load is larger")
    add("--resolution", type=float, default=0.125, help="where the search ends, as a share of the load that passes")
    add("--cores", default="1,0", help="core of the client, core of the server")
    add("--timeout", type=float, default=300, help="seconds until a client that does not end is killed")
    add("--out", type=Path, help="file for all figures, as JSON")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    given["clients"] = tuple(given["clients"].split(","))
    given["cores"] = tuple(map(int, given["cores"].split(",")))
    if unknown := set(given["clients"]) - set(CLIENTS):
        parser.error(f"--clients: {', '.join(sorted(unknown))}: expected some of {', '.join(CLIENTS)}")
    return Bench(**given), out


def main() -> int:
    """Run the benchmark; 1 when a client came to nothing. What was measured before an interruption is reported."""
    bench, out = parse(sys.argv[1:])
    setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    results: list[Result] = []
    try:
        run(bench, results)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"benchmarks.client: {error}", file=sys.stderr)
        return 1
    finally:
        print(table(results))
        if out:
            found = describe() | {"options": asdict(bench), "arrival_seconds": ARRIVAL_SECONDS}
            text = json.dumps(found | {"results": [asdict(result) for result in results]}, indent=1) + "\n"
            out.write_text(text.replace(str(Path.home()), "~"))
    return 1 if any(result.reason for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
