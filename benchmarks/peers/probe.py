"""One load of one client: what the client says that it saw, held against the stamps of the reference server."""

import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import WARM_UP
from benchmarks.peers.drivers import Client, Load, Seen, UnavailableError

JSON = dict[str, Any]
#: The mean ITL may be off by this share.
ITL_LIMIT = 0.01
#: Where the server is later than this, in seconds at p99, a load was not the one that was asked for.
LATENESS_LIMIT = 0.005
TRIES = 3
QUIET_SECONDS = 0.3


@dataclass(frozen=True)
class Probe:
    """One load and how it went; times in seconds. Differences are those of one request or gap, without their sign."""

    streams: int
    failed: int
    cpu: float
    wall: float
    ttft_p99: float = float("nan")
    server_ttft_p99: float = float("nan")
    itl_mean: float = float("nan")
    server_itl_mean: float = float("nan")
    server_lateness_p99: float = float("nan")
    ttft_difference: tuple[float, float] | None = None
    gap_difference: tuple[float, float] | None = None
    itl_difference: tuple[float, float] | None = None

    def passes(self, limit: float) -> bool:
        """Whether all requests ended on schedule, with TTFT at p99 within the limit and mean ITL within ITL_LIMIT."""
        itl = abs(self.itl_mean / self.server_itl_mean - 1)
        right = abs(self.ttft_p99 - self.server_ttft_p99) <= limit and itl <= ITL_LIMIT
        return self.on_schedule and not self.failed and right

    @property
    def on_schedule(self) -> bool:
        """Whether the server sent what it was asked for when it was due; else the client was not tried."""
        return self.server_lateness_p99 <= LATENESS_LIMIT


class Session:
    """One client: sends loads that are like `base` but for their number of streams, and remembers how each went."""

    def __init__(self, client: Client, base: Load, core: int, timeout: float):
        self._client, self._base, self._core, self._timeout = client, base, core, timeout
        self.probes: list[Probe] = []

    def probe(self, streams: int) -> Probe:
        """Send one load; raises UnavailableError when the client ends with an error or not at all."""
        with tempfile.TemporaryDirectory(prefix="client-") as folder:
            load = replace(self._base, streams=streams, out=Path(folder))
            since = stamps(load.url)[0]["next"]
            begun = time.monotonic()
            cpu = self._run(load)
            wall = time.monotonic() - begun
            try:
                seen = list(self._client.read(load.out))
            except (OSError, ValueError, KeyError, IndexError) as error:
                raise UnavailableError(f"its report cannot be read: {type(error).__name__}: {error}") from error
        summary, *sends = stamps(load.url, since)
        # Some clients try the server with a request before they begin.
        probe = compare(load.requests, seen, sends[-load.requests :], (cpu, wall), summary["lateness_seconds"]["p99"])
        self.probes.append(probe)
        time.sleep(QUIET_SECONDS)
        return probe

    def passes(self, streams: int, limit: float) -> bool:
        """Whether the client is right under a load; it may fail once, and where the server is late does not count."""
        known = [probe for probe in self.probes if probe.streams == streams]
        while len(known) < TRIES and sum(probe.on_schedule for probe in known) < TRIES - 1:
            if any(probe.passes(limit) for probe in known):
                break
            known.append(self.probe(streams))
        return any(probe.passes(limit) for probe in known)

    def _run(self, load: Load) -> float:
        """Run the client on its core; returns the CPU seconds of it and all of its children."""
        command = ["taskset", "-c", str(self._core), *self._client.command(load)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | self._client.environment(load)
        with (load.out / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            status, usage = wait(process, self._timeout)
        if status:
            said = (load.out / "log").read_text(errors="replace").strip()
            how = "it ran out of time" if status < 0 else f"it ended with {status}"
            raise UnavailableError(f"{how} at {load.streams} streams: {said[-400:]}")
        return usage


def wait(process: "subprocess.Popen[bytes]", seconds: float) -> tuple[int, float]:
    """Wait for a process, or kill its session; returns its exit status and the CPU seconds of its family."""
    deadline = time.monotonic() + seconds
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            os.killpg(process.pid, 9)
            deadline = float("inf")
        time.sleep(0.05)


def stamps(url: str, since: int | None = None) -> list[JSON]:
    """The server's summary and stamps; without a number the summary alone."""
    with urllib.request.urlopen(f"{url}/stamps?since={2**62 if since is None else since}") as answer:  # noqa: S310
        return [json.loads(line) for line in answer]


def compare(
    requests: int, seen: Sequence[Seen], sends: Sequence[JSON], cost: tuple[float, float], late: float
) -> Probe:
    """Hold what the client saw of all requests but the warm-up against what the server sent."""
    streams, failed = requests - WARM_UP, requests - len(seen)
    if failed or len(sends) != requests:
        return Probe(streams, max(failed, 1), *cost, server_lateness_p99=late)
    pairs = sorted(pair(seen, sends), key=lambda both: int(both[1]["number"]))[WARM_UP:]
    ttfts = np.array([[own.ttft, (sent["sent_ns"][0] - sent["received_ns"]) / 1e9] for own, sent in pairs])
    server_gaps = [np.diff(sent["sent_ns"]) / 1e9 for _, sent in pairs]
    itls = np.array([[own.itl, gaps.mean()] for (own, _), gaps in zip(pairs, server_gaps, strict=True)])
    whole = all(len(own.gaps) == len(gaps) for (own, _), gaps in zip(pairs, server_gaps, strict=True))
    own_gaps = np.concatenate([own.gaps for own, _ in pairs]) if whole else None
    ttft_p99, server_ttft_p99 = np.quantile(ttfts, 0.99, axis=0).tolist()
    itl_mean, server_itl_mean = itls.mean(axis=0).tolist()
    return Probe(
        *(streams, 0, *cost),
        *(ttft_p99, server_ttft_p99, itl_mean, server_itl_mean, late),
        differences(ttfts[:, 0], ttfts[:, 1]),
        differences(own_gaps, np.concatenate(server_gaps)) if own_gaps is not None else None,
        differences(itls[:, 0], itls[:, 1]),
    )


def pair(seen: Sequence[Seen], sends: Sequence[JSON]) -> list[tuple[Seen, JSON]]:
    """Each request of the client with the server's, by its id, by the id of the answer, or in the order of sending."""
    known = {sent["request_id"]: sent for sent in sends} | {f"cmpl-{sent['number']:012d}": sent for sent in sends}
    if all(own.key in known for own in seen):
        return [(own, known[own.key]) for own in seen]
    return list(zip(seen, sends, strict=True))


def differences(own: NDArray[np.float64], server: NDArray[np.float64]) -> tuple[float, float]:
    """How far apart they are, at p50 and p99."""
    low, high = np.quantile(np.abs(own - server), (0.5, 0.99)).tolist()
    return low, high
