"""Builds the fake NVML and runs the monitor with it, as a process of its own."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GIB = 1024**3
SECOND = 1_000_000_000
FOREVER = 1e9

Metrics = dict[tuple[str, ...], float]


def build(folder: Path) -> Path:
    """Compile the library into a folder that LD_LIBRARY_PATH can name."""
    library = folder / "libnvidia-ml.so.1"
    source = HERE / "fake_nvml.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-lpthread"], check=True)  # noqa: S607
    return library


@dataclass
class Script:
    """What the fake NVML plays; time 0 is when this was made. Changes take effect with `save`."""

    path: Path
    origin_ns: int = field(default_factory=time.monotonic_ns)
    lines: list[str] = field(default_factory=list)

    def add(self, *words: object) -> "Script":
        """Add a line."""
        self.lines.append(" ".join(map(str, words)))
        return self

    def save(self) -> None:
        """Let the library see the script, all at once."""
        new = self.path.with_suffix(".new")
        new.write_text("\n".join([f"origin {self.origin_ns}", *self.lines, ""]))
        new.replace(self.path)

    def now(self) -> float:
        """Seconds since time 0."""
        return (time.monotonic_ns() - self.origin_ns) / SECOND


class MonitorProcess:
    """`python -m monitor` with the fake NVML of a folder; `within` is a command that runs it, such as unshare."""

    def __init__(
        self, library: Path, script: Script, *options: str, within: Sequence[str] = (), **environ: str
    ) -> None:
        script.save()
        self._log = script.path.with_suffix(".log")
        self.process = subprocess.Popen(
            [*within, sys.executable, "-m", "monitor", "--port", "0", *options],
            cwd=ROOT,
            env=os.environ | {"LD_LIBRARY_PATH": str(library.parent), "FAKE_NVML_SCRIPT": str(script.path), **environ},
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )
        assert self.process.stdout
        self.banner = self.process.stdout.readline()
        assert self.banner, self.log
        self.url = self.banner.split()[1]

    def end(self) -> None:
        """Kill it; the log remains."""
        self.process.kill()
        self.process.communicate()

    @property
    def log(self) -> str:
        """What it has said besides its banner."""
        return self._log.read_text()

    def get(self, path: str) -> bytes:
        """Body of an answer."""
        with urllib.request.urlopen(self.url + path, timeout=20) as response:  # noqa: S310 - our own address
            return bytes(response.read())

    def health(self) -> dict[str, object]:
        """What /health answers."""
        answer: dict[str, object] = json.loads(self.get("/health"))
        return answer

    def metrics(self) -> Metrics:
        """Samples of /metrics, by name without its prefix and the values of the labels in the order of their names."""
        families = text_string_to_metric_families(self.get("/metrics").decode())
        return {
            (
                sample.name.removeprefix("headroom_"),
                *(sample.labels[name] for name in sorted(sample.labels)),
            ): sample.value
            for family in families
            for sample in family.samples
        }

    def wait(self, until: Callable[[Metrics], bool], seconds: float = 15) -> Metrics:
        """Scrape until the metrics are as wanted; fails with the log when they are not in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            metrics = self.metrics()
            if until(metrics):
                return metrics
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s; the log:\n{self.log}\n{metrics}")

    def timeline(self, **query: int) -> pa.Table:
        """What /timeline answers."""
        words = "&".join(f"{name}={value}" for name, value in query.items())
        return pa.ipc.open_stream(self.get(f"/timeline?{words}")).read_all()

    def series(self, metric: str, gpu: str = "0", server: str | None = None, **query: int) -> list[tuple[int, float]]:
        """Moments (ns) and values of a series."""
        rows = self.timeline(**query).to_pylist()
        return [
            (row["time_ns"], row["value"])
            for row in rows
            if (row["metric"], row["gpu"], row["server"]) == (metric, gpu, server)
        ]
