"""Sends loads with one client and remembers how each went."""

import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.drivers import Client, Load, UnavailableError
from loadtest.reference.probe import Probe, compare, stamps

TRIES = 3
QUIET_SECONDS = 0.3


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
