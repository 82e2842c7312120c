"""The servers and the monitor as processes of this machine: start, watch, stop, leave nothing behind."""

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import psutil

from experiment.environment import find_gpus
from experiment.plan import TARGETS, Plan

TAIL_LINES = 12
STOP_SECONDS = 30
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class RunError(Exception):
    """The run cannot go on; the message says why and what to do."""


@dataclass
class Program:
    """One process that was started; its output goes to `log`."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def check(self) -> None:
        """Raise RunError with the end of the log when the process has ended."""
        code = self.process.poll()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise RunError(f"{self.name} {how}. The end of {self.log}:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of its log, indented."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(f"  {line}" for line in lines)


class Stack:
    """The three programs that a comparison talks to; a context manager that stops them at its end."""

    def __init__(self, plan: Plan, logs: Path, say: Callable[[str], None]):
        self._plan = plan
        self._logs = logs
        self._say = say
        self.programs: dict[str, Program] = {}
        self._ready: set[str] = set()

    def __enter__(self) -> "Stack":
        if sys.platform == "linux":
            # What a killed program leaves behind becomes our child, so that `stop` finds it.
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until it is healthy; raises RunError when a program does not come up."""
        started = time.monotonic()
        commands = _commands(self._plan)
        for name, command in commands.items():
            environment = {"HEADROOM_SERVER": name} if name != "monitor" else {}
            if self._plan.model.startswith("random:"):
                environment["HF_HUB_OFFLINE"] = "1"
            log = self._logs / f"{name}.log"
            process = spawn([sys.executable, "-m", *command], log, environment)
            self.programs[name] = Program(name, process, log, f"http://127.0.0.1:{ports_of(self._plan)[name]}")
            if find_gpus()[0]:
                # vLLM measures how much memory is free: the others must have taken theirs by then.
                self._wait_until_healthy(self.programs[name], started)
        for program in self.programs.values():
            self._wait_until_healthy(program, started)

    def check(self) -> None:
        """Raise RunError when a program has ended."""
        for program in self.programs.values():
            program.check()

    def require_healthy(self, name: str) -> None:
        """Raise RunError unless the program runs and says that it is healthy; one that is dying gets 5 s to end."""
        program = self.programs[name]
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            program.check()
            if get(program.url + "/health") is not None:
                return
            time.sleep(0.2)
        raise RunError(f"{name} does not answer at {program.url}/health. The end of {program.log}:\n{program.tail()}")

    def max_model_len(self) -> int:
        """The longest context in tokens that both servers take, as they say in /v1/models; raises RunError."""
        limits = []
        for name in TARGETS:
            try:
                limits.append(
                    int(json.loads(get(self.programs[name].url + "/v1/models") or b"")["data"][0]["max_model_len"])
                )
            except (ValueError, KeyError, IndexError, TypeError) as error:
                self.require_healthy(name)
                raise RunError(f"{name} does not say in /v1/models how long its context is: {error}") from None
        return min(limits)

    def stop(self) -> None:
        """End all programs and what they leave behind, at the latest by force; no second signal gets in between."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        for program in self.programs.values():
            if program.process.poll() is None:
                program.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for program in self.programs.values():
            end(program.process, deadline - time.monotonic())
        for orphan in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
        for number, handler in before.items():
            signal.signal(number, handler)

    def _wait_until_healthy(self, program: Program, started: float) -> None:
        if program.name in self._ready:
            return
        said = started
        while get(program.url + "/health") is None:
            self.check()
            now = time.monotonic()
            if now - started > self._plan.start_seconds:
                raise RunError(
                    f"{program.name} was not healthy after --start-seconds {self._plan.start_seconds:g}. "
                    f"The end of {program.log}:\n{program.tail()}"
                )
            if now - said > 10:
                said = now
                self._say(f"waiting for {program.name}, {now - started:.0f} s so far")
            time.sleep(0.2)
        self._ready.add(program.name)
        self._say(f"{program.name} is ready at {program.url} after {time.monotonic() - started:.0f} s")


def _commands(plan: Plan) -> dict[str, list[str]]:
    """Module and arguments of each program, in the order in which they start."""
    ports = {name: ["--port", str(port)] for name, port in ports_of(plan).items()}
    common = ["--model", plan.model, "--dtype", plan.dtype]
    if plan.max_model_len:
        common += ["--max-model-len", str(plan.max_model_len)]
    share = ["--gpu-memory-utilization", str(plan.gpu_memory_utilization)]
    return {
        "monitor": ["monitor", *ports["monitor"]],
        "hf": ["servers.hf", *ports["hf"], *common, *shlex.split(plan.hf_args)],
        "vllm": ["servers.vllm", *ports["vllm"], *common, *share, *shlex.split(plan.vllm_args)],
    }


def spawn(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that Ctrl-C reaches it through us; it ends when we are killed."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a process that was told to end, then kill it."""
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def get(url: str, timeout_seconds: float = 5) -> bytes | None:
    """Body of a GET, or None when there is no good answer."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as response:  # noqa: S310 - our own programs
            return bytes(response.read())
    except (OSError, HTTPException):
        return None


def ports_of(plan: Plan) -> dict[str, int]:
    """Port of each program."""
    return {"hf": plan.hf_port, "vllm": plan.vllm_port, "monitor": plan.monitor_port}


def require_free(what: str, port: int) -> None:
    """Raise RunError when a port is taken; `what` says whose it is to be."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            raise RunError(f"{what}: {port}: {reason}; end the program there or choose another port") from None


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
