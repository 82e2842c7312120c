"""Keeps what a run leaves: the file of records, and beside it what the load generator measured of itself."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.options import Options
from loadtest.records import RecordFile

# Past these the load generator itself shapes the latencies it reports.
LIMITS = {
    "cpu_share": (0.8, "of a core"),
    "loop_lag_p99_seconds": (0.010, "s"),
    "send_lateness_p99_seconds": (0.010, "s"),
}


class Keeper:
    """The files of one run; raises OSError when they cannot be made or written."""

    def __init__(self, options: Options):
        self.path = Path(options.records) if options.records else _default_path()
        self._file = RecordFile(self.path)
        self.write = self._file.write

    def close(self, processes: Sequence[dict[str, Any]], lost: Sequence[int]) -> None:
        """Write client.json: each process's figures, the worst of each, and whether the run is valid and why not."""
        self._file.close()
        report = summarize(processes, lost)
        self.path.with_name("client.json").write_text(json.dumps(report, indent=2) + "\n")


def summarize(processes: Sequence[dict[str, Any]], lost: Sequence[int]) -> dict[str, Any]:
    """The load generator's figures over all its processes, and what they say against the run."""
    worst = {name: max((p[name] for p in processes if p[name] is not None), default=None) for name in LIMITS}
    reasons = [
        f"{name} is {value:.4f}, at most {LIMITS[name][0]:g} {LIMITS[name][1]} is allowed"
        for name, value in worst.items()
        if value is not None and value > LIMITS[name][0]
    ]
    if lost:
        reasons.append(f"workers were lost, with the requests they had not ended: {', '.join(map(str, lost))}")
    return {
        **worst,
        "goes_first": all(process["goes_first"] for process in processes),
        "requests_ended": dict(sum((Counter(p["requests_ended"]) for p in processes), Counter())),
        "skipped_lines": processes[0]["skipped_lines"] if processes else {},
        "valid": not reasons,
        "reasons": reasons,
        "lost_workers": list(lost),
        "processes": list(processes),
    }


def _default_path() -> Path:
    return Path("results") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-locust" / "records.arrow"
