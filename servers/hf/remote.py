"""The engine as the process that answers requests sees it: its commands and tokens go through a pipe."""

import asyncio
import itertools
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from socket import socket

from servers.hf.engine import Engine, State
from servers.hf.jobs import EngineDeadError, EngineFailedError, Job
from servers.hf.settings import Settings
from servers.hf.worker import Loaded, work
from servers.models import Model

STOP_SECONDS = 15
logger = logging.getLogger(__name__)


class RemoteEngine(Engine):
    """An engine in a process of its own, which is forked here: before this process has a thread or touches CUDA."""

    def __init__(self, settings: Settings, model: Model, sock: socket):
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        inherited = (self._connection, sock)
        self._process = context.Process(target=work, args=(settings, model, theirs, inherited), name="model")
        self._process.start()
        theirs.close()
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._commands: SimpleQueue[bytes] = SimpleQueue()
        self._asked: asyncio.Future[State] | None = None
        self._error: Exception | None = None
        self._gone = False

    async def load(self) -> Loaded:
        """Wait until the engine is ready, and what it is; raises ModelError or EngineDeadError."""
        readable = asyncio.Event()
        self._watch(readable.set)
        await readable.wait()
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        try:
            loaded: Loaded | Exception = self._connection.recv()
        except EOFError:
            raise EngineDeadError(f"the process of the model {await self._ending()} while it loaded") from None
        if isinstance(loaded, Exception):
            raise loaded
        self.name, self.limits, self.capacity = loaded.engine, loaded.limits, loaded.capacity
        return loaded

    async def start(self) -> None:
        """Take tokens; the engine is ready since it was loaded."""
        # The pipe holds a few dozen long prompts: to wait until it takes more would hold up every stream.
        threading.Thread(target=self._send_all, name="commands", daemon=True).start()
        self._watch(self._read)

    async def close(self) -> None:
        """Let the engine end what runs, and its process with it."""
        self._send("close")
        self._error = self._error or EngineDeadError("the server is shutting down")
        await self._ending()

    def kill(self) -> None:
        """End the process at once, if it still runs."""
        self._process.kill()
        self._process.join()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._error is None

    async def state(self) -> State:
        """What is held now; nothing, once the process has ended."""
        if self._gone:
            return State()
        if not self._asked:
            self._asked = asyncio.get_running_loop().create_future()
            self._send("state")
        # Shared, and not cancelled with one who asks: a process that hangs is asked once, however often it is scraped.
        return await asyncio.shield(self._asked)

    def submit(self, job: Job) -> None:
        """Queue a job; raises EngineDeadError, and other errors are what the job ends with."""
        if self._error:
            raise self._error
        job.number = next(self._numbers)
        self._jobs[job.number] = job
        self._send("submit", job)

    def cancel(self, job: Job) -> None:
        """Drop a job that waits, or end one that runs after the token it is working on; harmless when it has ended."""
        if self._jobs.pop(job.number, None):
            self._send("cancel", job.number)

    def _watch(self, callback: Callable[[], None]) -> None:
        """Have the event loop call when there is something to read."""
        number = self._connection.fileno()
        asyncio.get_running_loop().add_reader(number, callback)
        # uvloop makes what it watches non-blocking: a command for a full pipe would fail, and half a message too.
        os.set_blocking(number, True)

    def _send(self, *command: object) -> None:
        self._commands.put(pickle.dumps(command))

    def _send_all(self) -> None:
        with suppress(OSError):  # that the process has ended is told by the end of what it sends
            while True:
                self._connection.send_bytes(self._commands.get())

    def _read(self) -> None:
        """Take one message; the event loop calls again while there are more."""
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._lost()
            return
        if isinstance(message, State):
            self._answer(message)
            return
        for number, started, output in message:
            if isinstance(output, EngineDeadError):
                self._error = self._error or EngineDeadError(str(output))
            if job := self._jobs.get(number):
                job.started = started
                job.put(output)
                if isinstance(output, Exception) or output.finish_reason:
                    del self._jobs[number]

    def _lost(self) -> None:
        self._gone = True
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        ended = "the process of the model has ended"
        if not self._error:
            logger.error(ended)
        for job in self._jobs.values():
            job.put(self._error or (EngineFailedError if job.started else EngineDeadError)(ended))
        self._error = self._error or EngineDeadError(ended)
        self._jobs.clear()
        self._answer(State())

    async def _ending(self) -> str:
        """Wait for the process to end, for a while; says how it did."""
        await asyncio.to_thread(self._process.join, STOP_SECONDS)
        if self._process.is_alive():
            self.kill()
        code = self._process.exitcode or 0
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def _answer(self, state: State) -> None:
        if self._asked:
            self._asked.set_result(state)
        self._asked = None
