"""Keeps what a run leaves: the file of records, and beside it what the load generator measured of itself."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import gevent

from loadtest import __version__, figures
from loadtest.calibrate import known_limit
from loadtest.options import Options
from loadtest.records import RecordFile, count_by_target
from loadtest.run import Part
from loadtest.work.schedule import schedule
from loadtest.work.workloads import left_out, listed

# Past these the load generator itself shapes the latencies it reports. Of merged chunks all but the last have a stamp
# that is too late: 99 % of the stamps are to be right.
LIMITS = {
    "cpu_share": 0.8,
    "loop_lag_p99_seconds": 0.010,
    "send_lateness_p99_seconds": 0.010,
    "merged_chunk_share": 0.01,
}
# Workers on several hosts send on one schedule: it is kept as far as their clocks are known to agree.
CLOCK_SECONDS = LIMITS["send_lateness_p99_seconds"]
# What is said of a run until it has closed its files: of one that was killed it stays true.
UNFINISHED = "complete: the run did not come to its end"


class Keeper:
    """The files of one run; raises OSError for those that cannot be made, ValueError for a bad trace or data set."""

    def __init__(self, options: Options):
        lost = list(left_out(options))
        self.path = Path(options.records) if options.records else _default_path()
        self.summary = summary_of(self.path)
        self._options, self._run = options, dict[str, Any]()
        # Files may be gone or others by the end.
        self._listed, self._offsets = listed(options), schedule(options)
        self._file = RecordFile(self.path)
        self.write = self._file.write
        for line in lost:
            print(f"loadtest: {line}", flush=True)

    def begin(self, part: Part, users: int) -> None:
        """Write what is run in client.json, as a run that has not come to its end; raises OSError."""
        models = {target: self._options.model or part.models[target] for target in part.shares}
        self._run = {
            "run_id": part.run_id,
            "version": __version__,
            "began": _now(),
            "ended": None,
            "start_ns": part.start_ns,
            "wall_minus_monotonic_ns": time.time_ns() - time.monotonic_ns(),
            "users": users,
            "models": models,
            # JSON has no infinity.
            "options": {name: "inf" if value == math.inf else value for name, value in self._options},
        }
        nothing = summarize([], [], known_limit()) | {"valid": False, "reasons": [UNFINISHED]}
        self._say({"complete": False, "run": self._run, **nothing, "targets": {}})

    def close(
        self,
        processes: Sequence[dict[str, Any]],
        lost: Sequence[int],
        complete: bool,
        workers: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """Write client.json and return it, and print each target's figures.

        It also holds what was run, each process's figures, the worst of each, and what is against the run.

        `complete`: it was not stopped before all was sent and answered. `workers`: where each ran, and its connection.
        """
        self._file.close()
        # In a thread: with millions of requests workers would take a master that stands still for dead.
        targets, recorded = gevent.get_hub().threadpool.apply(self._measure)
        asked = gevent.get_hub().threadpool.apply(self._asked) if self._run and (complete or lost) else None
        requests = {target: (asked, recorded[target]) for target in self._run.get("models", recorded)}
        found = summarize(processes, lost, known_limit(), workers, requests)
        report = {"complete": complete, "run": self._run | {"ended": _now()}, **found, "targets": targets}
        self._say(report)
        print(*figures.lines(targets), sep="\n", flush=True)
        return report

    def _measure(self) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
        return figures.measure(self.path), count_by_target(self.path)

    def _asked(self) -> int | None:
        """How many requests each server was to be sent by now; None: as many as it takes until the run is stopped."""
        options = self._options
        if options.min_seconds:
            return None
        known = [number for number in (options.total, self._listed) if number is not None]
        if self._offsets:
            seconds = (time.monotonic_ns() - self._run["start_ns"]) / 1e9
            known.append(options.turns * sum(1 for _ in takewhile(lambda offset: offset <= seconds, self._offsets)))
        return min(known, default=None)

    def _say(self, report: Mapping[str, Any]) -> None:
        """Write client.json; one that is there is replaced as a whole."""
        new = self.summary.with_name(f"{self.summary.name}.new")
        new.write_text(json.dumps(report, indent=2) + "\n")
        new.replace(self.summary)


def summarize(
    processes: Sequence[dict[str, Any]],
    lost: Sequence[int],
    calibrated: float | None,
    workers: Sequence[dict[str, Any]] = (),
    requests: Mapping[str, tuple[int | None, int]] | None = None,
) -> dict[str, Any]:
    """The load generator's figures over all its processes, and what they say against the run.

    `calibrated` is the rate (chunks/s) up to which one process was found to be accurate on this machine, if it was.
    `requests`: how many were asked for, where that is known, and how many have a record, by target.
    """
    requests = requests or {}
    limits = LIMITS | ({"chunks_per_second_max": calibrated} if calibrated else {})
    names = (*LIMITS, "shared_stamp_share", "chunks_per_second_max")
    worst = {name: max((p[name] for p in processes if p[name] is not None), default=None) for name in names}
    reasons = [
        f"{name}: {value:.6g}: at most {limits[name]:.6g}"
        for name, value in worst.items()
        if value is not None and name in limits and value > limits[name]
    ]
    reasons += [reason for worker in workers for reason in _against(worker)]
    if lost:
        reasons.append(f"lost_workers: {', '.join(map(str, lost))}: {_missing(requests)}")
    return {
        **worst,
        "goes_first": all(process["goes_first"] for process in processes),
        "requests_asked": {target: asked for target, (asked, _) in requests.items()},
        "requests_recorded": {target: recorded for target, (_, recorded) in requests.items()},
        "requests_ended": dict(sum((Counter(p["requests_ended"]) for p in processes), Counter())),
        "skipped_lines": processes[0]["skipped_lines"] if processes else {},
        "calibrated_chunks_per_second": calibrated,
        "valid": not reasons,
        "reasons": reasons,
        "lost_workers": list(lost),
        "workers": list(workers),
        "processes": list(processes),
    }


def _missing(requests: Mapping[str, tuple[int | None, int]]) -> str:
    """What a run has no record of because its workers were lost."""
    asked = [number for number, _ in requests.values() if number is not None]
    if len(asked) < max(1, len(requests)):
        return "what they had not ended has no record"
    return f"of {sum(asked)} requests {sum(asked) - sum(recorded for _, recorded in requests.values())} have no record"


def _against(worker: dict[str, Any]) -> Iterator[str]:
    """What a worker's clock and its connection to the master say against a run."""
    name = f"worker {worker['worker']} on {worker['host']}"
    if (uncertainty := worker["clock"]["uncertainty_seconds"]) > CLOCK_SECONDS:
        yield f"clock_uncertainty_seconds: {uncertainty:.6g}: at most {CLOCK_SECONDS:.6g}: {name}"
    for cut in worker["cut_off"]:
        yield f"cut_off_seconds: {cut['seconds']:.1f}: {name}: its requests in that time may show the network"
    if worker["lost_records"]:
        yield f"lost_records: {worker['lost_records']}: {name}: they did not reach the master"


def summary_of(path: Path) -> Path:
    """Where a run whose records are at a path says what it measured of itself; two may be kept in one folder."""
    return path.with_name("client.json" if path.stem == "records" else f"{path.stem}.json")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _default_path() -> Path:
    """In a new folder, named after the time; of those made in the same second all but the first have a number."""
    began = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for number in count(1):
        folder = Path("results") / f"{began}{f'-{number}' if number > 1 else ''}-locust"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    return folder / "records.arrow"
