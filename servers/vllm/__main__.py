"""`python -m servers.vllm`: start vLLM's server, wait until it is healthy, pass signals on, leave nothing behind."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import TextIO

import psutil

from servers.models import ModelError, resolve
from servers.settings import fail, listen, parse
from servers.vllm.launch import (
    PROGRAM,
    Settings,
    arguments,
    built_for_cpu,
    environment,
    explained,
    raised,
    second_size,
)

PROGRESS_SECONDS = 10
STOP_SECONDS = 20
TAIL_LINES = 25
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    """Run vLLM until it ends or a signal ends it; exits with 0 only in the second case."""
    settings = parse(Settings, PROGRAM, sys.argv[1:])
    gpu = not built_for_cpu()
    if other := second_size(settings, gpu, os.environ):
        print(f"{PROGRAM}: --kv-budget {settings.kv_budget}: {other} sizes the KV cache too; give one", file=sys.stderr)
        raise SystemExit(2)
    try:
        model = resolve(settings.model)
        listen(settings.host, settings.port).close()
    except (ModelError, OSError) as error:
        raise fail(PROGRAM, error) from None
    if sys.platform == "linux":
        # Processes that vLLM leaves behind become our children, so that we can end them.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(
        arguments(settings, model, gpu),
        env=environment(settings, gpu, os.environ),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    raise SystemExit(_look_after(process, settings))


@dataclass
class Output:
    """What vLLM has written so far: its last lines and the first error."""

    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    error: str | None = None

    def copy(self, stream: TextIO) -> None:
        """Keep what the stream says and pass it on, until its end."""
        for line in stream:
            self.tail.append(line)
            self.error = self.error or raised(line)
            sys.stdout.write(line)
            sys.stdout.flush()


def _look_after(process: subprocess.Popen[str], settings: Settings) -> int:
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        process.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    output = Output()
    assert process.stdout  # noqa: S101 - it is piped
    reader = threading.Thread(target=output.copy, args=(process.stdout,), daemon=True)
    reader.start()
    ready = _wait_until_healthy(process, settings, output.tail, stopping)
    if not ready and process.poll() is None:
        process.terminate()
    while process.poll() is None and not stopping.wait(1.0) and ready:
        pass
    _end(process)
    reader.join(timeout=2)
    if stopping.is_set():
        return 0
    what = "ended" if ready else "did not become healthy and ended"
    print(f"{PROGRAM}: vLLM {what}, exit code {process.returncode}. Its last lines:", file=sys.stderr)
    print("".join(f"  {line}" for line in output.tail), file=sys.stderr)
    if output.error and not ready:
        # The tail ends in the traceback of another process than the one that failed.
        print(f"{PROGRAM}: {explained(settings, output.error)}", file=sys.stderr)
    sys.stderr.flush()
    return 1


def _wait_until_healthy(
    process: subprocess.Popen[str], settings: Settings, tail: deque[str], stopping: threading.Event
) -> bool:
    started = time.monotonic()
    said = 0
    while process.poll() is None and not stopping.is_set():
        waited = time.monotonic() - started
        if _healthy(f"http://{settings.host}:{settings.port}/health"):
            _say(f"{settings.model} is ready at http://{settings.host}:{settings.port} after {waited:.0f} s")
            return True
        if waited > settings.start_seconds:
            _say(f"--start-seconds: vLLM was not healthy after {settings.start_seconds:g} s")
            return False
        if waited // PROGRESS_SECONDS > said:
            said = int(waited // PROGRESS_SECONDS)
            _say(f"waiting for vLLM, {waited:.0f} s so far; it says: {tail[-1].strip() if tail else 'nothing yet'}")
        stopping.wait(0.25)
    return False


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 - our own server's address
            return bool(response.status == 200)
    except (OSError, HTTPException):
        return False


def _end(process: subprocess.Popen[str]) -> None:
    """Let vLLM end by itself for a while, then kill whatever is left of it."""
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _say(f"vLLM did not end within {STOP_SECONDS} s and is killed")
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=1)
    process.wait()


def _say(text: str) -> None:
    print(f"{PROGRAM}: {text}", flush=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
