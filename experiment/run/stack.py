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
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import psutil

from experiment.environment import find_gpus
from experiment.plan.plan import Plan, Target

TAIL_LINES = 12
STOP_SECONDS = 30
# vLLM says why its engine died, and ends its processes, one after another.
DYING_SECONDS = 15
# What a monitor may take of a core by default.
MONITOR_CPU = 0.02
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
            raise RunError(f"{self.name} {how}. {self.tail()}")

    def tail(self) -> str:
        """The last lines of its log, indented, under a line that names it."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return f"The end of {self.log}:\n" + "\n".join(f"  {line}" for line in lines)


@dataclass
class Remote:
    """A program that ran already and is only talked to."""

    name: str
    url: str

    def check(self) -> None:
        """Nothing: its end shows in what it answers."""

    def tail(self) -> str:
        """Where to look."""
        return "It was not started here: see its own log."


class Stack:
    """The servers and the monitor of a comparison; a context manager that stops what it has started at its end."""

    def __init__(self, plan: Plan, logs: Path, say: Callable[[str], None]):
        self._plan = plan
        self._logs = logs
        self._say = say
        self.programs: dict[str, Program] = {}
        self._remotes: dict[str, Remote] = {}
        self._ready: set[str] = set()
        # By this our monitor tells our servers from those of another comparison on this machine, if all are our own.
        own = not plan.monitor_url and not any(target.url for target in plan.targets)
        self._id = uuid.uuid4().hex if own else None
        ports = ports_of(plan)
        # A server that is started again is found where it was.
        self._ports = {target.name: ports.get(target.name) or free_port() for target in plan.targets}

    def __getitem__(self, name: str) -> Program | Remote:
        return self.programs.get(name) or self._remotes[name]

    def __contains__(self, name: str) -> bool:
        return name in self.programs or name in self._remotes

    def __enter__(self) -> "Stack":
        if sys.platform == "linux":
            # What a killed program leaves behind becomes our child, so that `stop` finds it.
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the monitor and the servers that are up from the start, and wait until they are healthy.

        Raises RunError when a program does not come up.
        """
        self._start({"monitor": self._monitor(), **(self._servers() if self._plan.resident == "all" else {})})

    def focus(self, name: str) -> None:
        """See that a server is up, where one is resident after stopping the others; raises RunError."""
        if name not in self:
            self.stop([other for other in self.programs if other != "monitor"])
            self._start({name: self._servers()[name]})

    def check(self) -> None:
        """Raise RunError when a program has ended."""
        for program in self.programs.values():
            program.check()

    def require_healthy(self, name: str) -> None:
        """Raise RunError unless the program runs and says that it is healthy; one that is dying has time to end."""
        program = self[name]
        deadline = time.monotonic() + DYING_SECONDS
        while time.monotonic() < deadline:
            program.check()
            if _is_up(program):
                return
            time.sleep(0.2)
        raise RunError(f"{name} does not answer at {program.url}/health. {program.tail()}")

    def max_model_len(self) -> int:
        """The longest context in tokens that all servers take, by the plan or as they say; raises RunError."""
        if self._plan.resident == "one" and self._plan.max_model_len:
            return self._plan.max_model_len
        return min(self._context(target.name) for target in self._plan.targets)

    def stop(self, names: Sequence[str] | None = None) -> None:
        """End programs, all by default, and what they leave behind, at the latest by force; no signal gets between."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        programs = {name: self.programs[name] for name in (self.programs if names is None else names)}
        for program in programs.values():
            if program.process.poll() is None:
                program.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for name, program in programs.items():
            end(program.process, deadline - time.monotonic())
            del self.programs[name]
            self._ready.discard(name)
        self._kill_orphans()
        for number, handler in before.items():
            signal.signal(number, handler)

    def _kill_orphans(self) -> None:
        kept = {program.process.pid for program in self.programs.values()}
        for child in psutil.Process().children():
            if child.pid not in kept:
                with suppress(psutil.NoSuchProcess):
                    for process in [*child.children(recursive=True), child]:
                        process.kill()

    def _start(self, commands: dict[str, "str | list[str]"]) -> None:
        """Start programs by their commands, or use those at a URL; wait until all are healthy."""
        started = time.monotonic()
        # vLLM measures how much memory of a GPU is free: the others must have taken theirs by then.
        on_gpu = bool(find_gpus()[0])
        for name, command in sorted(commands.items(), key=lambda item: "servers.vllm" in item[1]):
            log = self._logs / f"{name}.log"
            if on_gpu and "servers.vllm" in command:
                self._wait_for(commands, started)
            if isinstance(command, str):
                self._remotes[name] = Remote(name, command.rstrip("/"))
            else:
                url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
                self.programs[name] = Program(name, self._spawn(name, command, log), log, url)
        self._wait_for(commands, started)

    def _wait_for(self, names: Iterable[str], started: float) -> None:
        """Wait until those of them that were started are healthy; raises RunError."""
        for name in names:
            if name in self:
                self._wait_until_healthy(self[name], started)

    def _spawn(self, name: str, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        environment: dict[str, str | None] = {"HEADROOM_STACK": self._id}
        if name != "monitor":
            environment["HEADROOM_SERVER"] = name
        if self._plan.model.startswith("random:"):
            environment["HF_HUB_OFFLINE"] = "1"
        if {"--prefix-caching", "--enable-prefix-caching"} & set(command):
            environment["VLLM_SERVER_DEV_MODE"] = "1"  # it then offers to reset that cache
        if gpus := next((target.gpus for target in self._plan.targets if target.name == name), ""):
            # By this order the numbers are those of nvidia-smi and of the monitor.
            environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus}
        return spawn([sys.executable, "-m", *command], log, environment)

    def _monitor(self) -> "str | list[str]":
        """Our own may take its usual share of a core for each GPU, as each needs it, unless the user says otherwise."""
        if self._plan.monitor_url:
            return self._plan.monitor_url
        command, gpus = ["monitor", "--port", str(self._plan.monitor_port)], len(find_gpus()[0])
        if gpus > 1 and "HEADROOM_MONITOR_MAX_CPU" not in os.environ:
            command += ["--max-cpu", f"{min(1.0, gpus * MONITOR_CPU):g}"]
        return command

    def _servers(self) -> dict[str, "str | list[str]"]:
        return {t.name: t.url or command_of(self._plan, t, self._ports[t.name]) for t in self._plan.targets}

    def _context(self, name: str) -> int:
        program = self[name]
        try:
            said = json.loads(get(program.url + "/v1/models") or b"")["data"][0]["max_model_len"]
            return min(int(said), self._plan.max_model_len or int(said))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            self.require_healthy(name)
            if isinstance(program, Remote) and self._plan.max_model_len:
                return self._plan.max_model_len
            advice = "; say --max-model-len" if isinstance(program, Remote) else ""
            raise RunError(f"{name} does not say in /v1/models how long its context is: {error}{advice}") from None

    def _wait_until_healthy(self, program: Program | Remote, started: float) -> None:
        if program.name in self._ready:
            return
        said = started
        while not _is_up(program):
            self.check()
            now = time.monotonic()
            if now - started > self._plan.start_seconds:
                raise RunError(
                    f"{program.name} was not healthy at {program.url} after --start-seconds "
                    f"{self._plan.start_seconds:g}. {program.tail()}"
                )
            if now - said > 10:
                said = now
                self._say(f"waiting for {program.name}, {now - started:.0f} s so far")
            time.sleep(0.2)
        self._ready.add(program.name)
        self._say(f"{program.name} is ready at {program.url} after {time.monotonic() - started:.0f} s")


def _is_up(program: Program | Remote) -> bool:
    """Whether it answers; a server of others may have no /health."""
    paths = ("/health", "/v1/models") if isinstance(program, Remote) else ("/health",)
    return any(get(program.url + path) is not None for path in paths)


def command_of(plan: Plan, target: Target, port: int) -> list[str]:
    """Module and arguments of a server that is started."""
    command = [f"servers.{target.kind}", "--port", str(port), "--model", plan.model, "--dtype", plan.dtype]
    if plan.max_model_len:
        command += ["--max-model-len", str(plan.max_model_len)]
    if plan.kv_budget:
        command += ["--kv-budget", str(plan.kv_budget)]
    if target.kind == "vllm":
        command += ["--gpu-memory-utilization", str(plan.gpu_memory_utilization)]
    return command + joined(plan.hf_args if target.kind == "hf" else plan.vllm_args, target.args)


def joined(*arguments: str) -> list[str]:
    """Join command lines, each of which may have a part after --, so that these parts are behind one --."""
    own: list[str] = []
    passed_on: list[str] = []
    for words in map(shlex.split, arguments):
        at = words.index("--") if "--" in words else len(words)
        own += words[:at]
        passed_on += words[at + 1 :]
    return own + (["--", *passed_on] if passed_on else [])


def spawn(command: list[str], log: Path, environment: Mapping[str, str | None]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that Ctrl-C reaches it through us; it ends when we are killed.

    Its environment is ours with these changes; None unsets a variable.
    """
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in variables.items() if value is not None},
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
    """The ports that the plan names, by the programs that are started there: the first of each kind."""
    ports = {} if plan.monitor_url else {"monitor": plan.monitor_port}
    for kind, port in (("hf", plan.hf_port), ("vllm", plan.vllm_port)):
        names = [target.name for target in plan.targets if target.kind == kind and not target.url]
        ports |= {names[0]: port} if names else {}
    return ports


def option_of(plan: Plan, name: str) -> str:
    """The option that gives a program its port."""
    kinds = {target.name: target.kind for target in plan.targets}
    return f"--{kinds.get(name, name)}-port"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
