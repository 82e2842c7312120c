"""What goes between master and workers over Locust's messages, on one machine or several.

Each second a worker asks and the master answers. That compares their clocks, tells a worker how much of what it told
has arrived, so that it tells the rest again, and shows a worker that the master was restarted.
"""

import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import gevent
import locust.runners
from gevent.event import Event
from locust.rpc import Message
from locust.runners import MasterRunner, WorkerRunner

from loadtest.clock import RECENT, Agreement, Comparison, Exchange, clock_name

ASK, ANSWER, TELL = "headroom_ask", "headroom_answer", "headroom_tell"
ASK_SECONDS, FIRST_ASK_SECONDS, ANSWER_SECONDS = 1.0, 0.02, 2.0
# A master that has not heard of a worker for so long says so; both take the other for lost after the longer time.
SILENT_SECONDS, LOST_SECONDS = 3.0, 10
# How long the end of a worker waits for a master that takes nothing more.
LEAVE_SECONDS = 2.0


def settle_timeouts() -> None:
    """Have Locust's master and workers give each other up after the same time."""
    locust.runners.MASTER_HEARTBEAT_TIMEOUT = LOST_SECONDS  # seconds
    locust.runners.HEARTBEAT_LIVENESS = LOST_SECONDS  # heartbeats, one a second
    # After a minute Locust would place the users of a lost worker anew, and so cancel what the others have under way.
    locust.runners.HEARTBEAT_DEAD_INTERNAL = -(10**9)


class WorkerEnd:
    """A worker's end: asks, and tells what must arrive."""

    def __init__(self, runner: WorkerRunner):
        self._runner = runner
        self._clock = Comparison()
        self._run = ""
        self._told = self._told_before = 0
        self._kept: deque[dict[str, Any]] = deque()
        self._asked_ns = self._unknown = 0
        self._answered = Event()
        runner.register_message(ANSWER, lambda msg, **_: self._hear(msg.data))
        self._asking = gevent.spawn(self._ask_regularly)

    def begin(self, run: str) -> None:
        """Forget what was told of an earlier run."""
        self._run, self._told, self._told_before = run, 0, 0
        self._kept.clear()

    def tell(self, kind: str, data: Any) -> None:
        """Tell the master, in order and again until it has arrived."""
        self._kept.append({"run": self._run, "number": self._told, "kind": kind, "data": data})
        self._told += 1
        self._runner.send_message(TELL, self._kept[-1])

    def close(self) -> None:
        """Wait until what was told has left this process, where the master still takes it; nothing follows.

        pyzmq does not: what its thread has not sent when the interpreter ends is lost.
        """
        self._asking.kill()
        connection = self._runner.client.socket
        connection.close(linger=int(LEAVE_SECONDS * 1000))
        connection.context.term()

    @property
    def is_cut_off(self) -> bool:
        """Whether the master was silent for so long that Locust ends this process."""
        last = self._runner.last_heartbeat_timestamp
        return last is not None and last < time.time() - LOST_SECONDS

    def _ask_regularly(self) -> None:
        about = {"host": socket.gethostname(), "clock": clock_name()}
        while True:
            best = self._clock.best
            found = [best.offset_ns, best.uncertainty_ns] if best else None
            self._answered.clear()
            self._told_before = self._told
            self._asked_ns = time.monotonic_ns()
            self._runner.send_message(ASK, {**about, "sent_ns": self._asked_ns, "found": found})
            self._answered.wait(ANSWER_SECONDS)
            gevent.sleep(FIRST_ASK_SECONDS if self._clock.exchanges < RECENT else ASK_SECONDS)

    def _hear(self, answer: dict[str, Any]) -> None:
        back_ns = time.monotonic_ns()
        if answer["sent_ns"] != self._asked_ns:
            return  # too late: another question was sent since
        self._clock.add(Exchange(self._asked_ns, answer["received_ns"], answer["answered_ns"], back_ns))
        self._unknown = 0 if answer["known"] else self._unknown + 1
        if self._unknown > 1:  # once: when a run ends Locust's master forgets its workers for a moment
            # Another master than the one that this worker made itself known to. Locust's worker does so again when it
            # is told to stop, and what it does for a run that nobody keeps the records of comes to an end.
            self._unknown = 0
            self._runner.handle_message(Message("stop", None, self._runner.client_id))
        elif answer["run"] == self._run:
            while self._kept and self._kept[0]["number"] < answer["heard"]:
                self._kept.popleft()
            # One connection keeps the order: what was told before the question and was not heard went with another.
            if answer["heard"] < self._told_before:
                for message in list(self._kept):
                    self._runner.send_message(TELL, message)
        self._answered.set()


@dataclass
class Peer:
    """What the master knows of a worker; times are CLOCK_MONOTONIC of the master in ns."""

    heard_ns: int
    host: str = ""
    clock: str = ""
    found: tuple[int, int] | None = None
    agreement: Agreement = field(default_factory=lambda: Agreement(0, 0))
    heard: int = 0
    silent: bool = False
    cut_off: list[dict[str, float]] = field(default_factory=list)


class MasterEnd:
    """The master's end: answers, passes on each thing that was told once and in order, and watches the workers."""

    def __init__(self, runner: MasterRunner, hear: Callable[[str, str, Any], None]):
        self._runner, self._pass_on = runner, hear
        self._peers: dict[str, Peer] = {}
        self._ranks: dict[str, int] = {}
        self._run = ""
        self._clock = clock_name()
        runner.register_message(ASK, lambda msg, **_: self._answer(msg.node_id, msg.data))
        runner.register_message(TELL, lambda msg, **_: self._hear(msg.node_id, msg.data))

    def compare_clocks(self, nodes: Iterable[str]) -> dict[str, int]:
        """Wait for each worker's clock to be compared, and agree on an offset (ns) for the run that begins.

        Raises TimeoutError that names the workers that did not ask.
        """
        deadline = time.monotonic() + SILENT_SECONDS
        wanted = list(nodes)
        while missing := [node for node in wanted if node not in self._peers or not self._peers[node].found]:
            if time.monotonic() > deadline:
                names = ", ".join(missing)
                raise TimeoutError(f"workers: {names}: did not compare clocks in {SILENT_SECONDS:g} s; other version?")
            gevent.sleep(0.02)
        self._peers = {node: self._peers[node] for node in wanted}
        offsets = {}
        for node in wanted:
            peer = self._peers[node]
            assert peer.found  # noqa: S101 - waited for above
            peer.agreement = Agreement.of(*peer.found, same_name=peer.clock == self._clock)
            offsets[node] = peer.agreement.offset_ns
        return offsets

    def begin(self, run: str, ranks: dict[str, int]) -> None:
        """A run begins, with these workers."""
        self._run, self._ranks = run, ranks
        for node, rank in ranks.items():
            peer = self._peers[node]
            peer.heard, peer.silent, peer.cut_off = 0, False, []
            agreed = peer.agreement
            clock = (
                "this host's clock"
                if agreed.same_clock
                else f"clock {agreed.offset_ns / 1e9:+.6f} s +/- {agreed.uncertainty_ns / 1e6:.3f} ms to the master's"
            )
            _say(f"worker {rank} is on {peer.host}, {clock}")

    def end(self, lost: Iterable[str]) -> None:
        """The run is over: silence means nothing now, and workers that were lost are forgotten.

        As long as Locust's master has one of those it takes itself to be stopping. One that is there after all makes
        itself known again.
        """
        self._ranks = {}
        clients = self._runner.clients
        for node in {*lost, *(one.id for one in clients.missing)} & set(clients):
            del clients[node]
        self._runner.check_stopped()

    def look(self) -> None:
        """Say which workers have not been heard of for a while."""
        for node, rank in self._ranks.items():
            peer = self._peers[node]
            if not peer.silent and self._silence(peer):
                peer.silent = True
                _say(f"worker {rank} on {peer.host}: nothing heard for {SILENT_SECONDS:g} s")

    def report(self, node: str) -> dict[str, Any]:
        """Where a worker ran, its clock, and when it was cut off from the master, in this run."""
        peer = self._peers[node]
        agreed = asdict(peer.agreement)
        clock = {name.replace("_ns", "_seconds"): one / 1e9 for name, one in agreed.items() if name.endswith("_ns")}
        clock |= {name: one for name, one in agreed.items() if not name.endswith("_ns")}
        return {"host": peer.host, "clock": clock, "cut_off": [*peer.cut_off, *self._silence(peer)]}

    def _answer(self, node: str, question: dict[str, Any]) -> None:
        received_ns = time.monotonic_ns()
        peer = self._note(node)
        peer.host, peer.clock = question["host"], question["clock"]
        if question["found"]:
            peer.found = (question["found"][0], question["found"][1])
            peer.agreement.see(*peer.found)
        answer = {"known": node in self._runner.clients, "run": self._run, "heard": peer.heard}
        stamps = {"sent_ns": question["sent_ns"], "received_ns": received_ns}
        self._runner.send_message(ANSWER, {**answer, **stamps, "answered_ns": time.monotonic_ns()}, node)

    def _hear(self, node: str, told: dict[str, Any]) -> None:
        peer = self._note(node)
        if told["run"] == self._run and told["number"] == peer.heard:
            peer.heard += 1
            self._pass_on(node, told["kind"], told["data"])

    def _note(self, node: str) -> Peer:
        """Any sign of life."""
        peer = self._peers.setdefault(node, Peer(time.monotonic_ns()))
        if node in self._ranks:
            for silence in self._silence(peer):
                peer.cut_off.append(silence)
                _say(f"worker {self._ranks[node]} on {peer.host} is back after {silence['seconds']:.1f} s")
        peer.heard_ns, peer.silent = time.monotonic_ns(), False
        return peer

    def _silence(self, peer: Peer) -> list[dict[str, float]]:
        """The silence that lasts until now, when it is one."""
        seconds = (time.monotonic_ns() - peer.heard_ns) / 1e9
        return [{"since_ns": peer.heard_ns, "seconds": seconds}] if seconds > SILENT_SECONDS else []


def _say(text: str) -> None:
    print(f"loadtest: {text}", file=sys.stderr, flush=True)
