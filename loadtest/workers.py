"""A run over Locust's processes: the one that keeps the records, and those that send requests.

Without workers both are the same process. With workers the master gives each a share of the requests; they pass their
records on, so that the run leaves one file, and the records of a worker that is killed are kept but for the last half
second. Times are by the master's clock, wherever a worker runs.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust import User
from locust.dispatch import UsersDispatcher
from locust.env import Environment
from locust.runners import STATE_MISSING, STATE_STOPPING, MasterRunner, WorkerNode, WorkerRunner

from loadtest.keeper import Keeper
from loadtest.link import LOST_SECONDS, MasterEnd, WorkerEnd, settle_timeouts
from loadtest.models import first_models
from loadtest.options import Options, check
from loadtest.records import number_in
from loadtest.run import Part, Run, Share, Watcher, whole
from loadtest.users import TargetUser

PART, FINISH = "headroom_part", "headroom_finish"
RECORDS, DONE, FINISHED = "records", "done", "finished"
BAD_OPTIONS, RECORDS_LOST, WORKERS_LOST, CUT_OFF = 2, 3, 4, 5
FINISH_SECONDS, ASK_AGAIN_SECONDS = 10.0, 2.0
WATCH_SECONDS = 0.5
# Locust's master gives its workers a minute to stop.
OVER_SECONDS = 60 + FINISH_SECONDS + 5


class Sender:
    """Sends this process's part; `tell` takes it to the keeper of the records, which may be this process."""

    def __init__(self, environment: Environment, tell: Callable[[str, Any], None], watcher: Watcher):
        self._environment, self._tell, self._watcher = environment, tell, watcher

    def start(self, part: Part) -> None:
        """Begin to send; raises ValueError for options that do not work here."""
        options = _options(self._environment)
        TargetUser.current = Run(options, part, lambda batch: self._tell(RECORDS, batch), self.end, self._watcher)

    def finish(self) -> None:
        """End what is under way, and pass on the last records and this process's own figures."""
        run, TargetUser.current = TargetUser.current, None
        if run:
            self._tell(FINISHED, run.close())

    def end(self, failure: Exception | None) -> None:
        """Tell that this process's part is done, or why it cannot go on."""
        kept = "its records cannot be kept: " if isinstance(failure, OSError) else ""
        self._tell(DONE, f"{kept}{failure}" if failure else None)


class Coordinator:
    """Keeps the records of all shares, and ends the run when each is done or lost."""

    def __init__(self, environment: Environment, master: MasterRunner | None = None):
        self._environment, self._master = environment, master
        self._link = MasterEnd(master, self.hear) if master else None
        self._keeper: Keeper | None = None
        self._ranks: dict[str, int] = {}
        self._failed = False
        self._done: set[str] = set()
        self._summaries: dict[str, dict[str, Any]] = {}
        self._lost: set[str] = set()
        self._kept: Counter[str] = Counter()
        self._watcher: gevent.Greenlet[..., None] | None = None
        self._over = Event()
        self._over.set()

    @property
    def path(self) -> Path | None:
        """The file of records of the latest run."""
        return self._keeper.path if self._keeper else None

    def start(self, options: Options, targets: Sequence[str], senders: dict[str, set[str]]) -> dict[str, Part]:
        """Open the records' file and share the run out; `senders`: the nodes, each with what it can send to.

        Raises OSError, ValueError for a server that does not say its model, TimeoutError for a worker without a clock.
        """
        self.forget()
        self._over.clear()
        models = first_models(options, targets)
        offsets = self._link.compare_clocks(senders) if self._link else {}
        self._keeper = Keeper(options)
        self._ranks = {node: rank for rank, node in enumerate(senders)}
        self._done, self._summaries, self._lost, self._kept = set(), {}, set(), Counter()
        print(f"loadtest: records go to {self._keeper.path}", flush=True)
        shares: dict[str, dict[str, Share]] = {node: {} for node in senders}
        for target in targets:
            able = [node for node, reached in senders.items() if target in reached]
            for rank, node in enumerate(able):
                shares[node][target] = Share(rank, len(able))
        run = replace(whole(targets), models=models)
        self._keeper.begin(run, self._environment.runner.target_user_count if self._environment.runner else 0)
        if self._link:
            self._link.begin(run.run_id, self._ranks)
        return {
            node: replace(run, shares=shares[node], worker=rank, clock_offset_ns=offsets.get(node, 0))
            for node, rank in self._ranks.items()
        }

    def forget(self) -> None:
        """Have nothing to finish: no run, or one that did not begin."""
        self._keeper, self._ranks, self._failed = None, {}, False
        self._over.set()

    def wait_until_over(self) -> bool:
        """Wait until the files of the latest run are closed; False when it takes longer than it may.

        Locust's master says that it has stopped up to a second before. It would wait for the users of a run that begins
        by then to stop too, give up after a minute, and finish that run.
        """
        return self._over.wait(OVER_SECONDS)

    def hear(self, node: str, kind: str, data: Any) -> None:
        """Take what a sender tells."""
        if node not in self._ranks or not self._keeper:
            return  # of an earlier run
        if kind == RECORDS:
            if self._failed:
                return
            try:
                self._keeper.write(data)
                self._kept[node] += number_in(data) if self._link else 0
            except OSError as error:
                self.fail(f"its records cannot be kept: {error}")
        elif kind == FINISHED:
            self._summaries[node] = data
        else:
            self._done.add(node)
            if data:
                self.fail(data)
            elif self._done | self._lost >= self._ranks.keys():
                self.end()

    def watch(self) -> None:
        """Notice workers that were lost while the run goes on."""
        self._watcher = gevent.spawn(self._watch)

    def finish(self, ask: Callable[[str], None]) -> None:
        """Close the files once each sender that is left has passed on its last records; `ask` asks one for them."""
        if self._watcher:
            self._watcher.kill()
            self._watcher = None
        if not self._keeper:
            return
        asked = started = time.monotonic()
        while waiting := self._ranks.keys() - self._summaries.keys() - self._gone():
            if time.monotonic() >= asked:
                for node in waiting:
                    ask(node)
                asked += ASK_AGAIN_SECONDS
            if time.monotonic() > started + FINISH_SECONDS:
                break
            gevent.sleep(0.02)
        self._close()
        self._over.set()
        if self._link:
            self._link.end(self._lost)
        if self._lost:
            self.end()  # when the last worker is lost Locust ends the test, but not the program

    def fail(self, error: object, code: int = RECORDS_LOST) -> None:
        """End the run because it cannot go on."""
        self._failed = True
        print(f"loadtest: the run ends: {error}", file=sys.stderr, flush=True)
        self._environment.process_exit_code = code
        self.end()

    def refuse(self, error: OSError | ValueError) -> None:
        """End a run that did not begin."""
        self.forget()
        if isinstance(error, OSError):
            self.fail(f"its records cannot be kept: {error}")
        else:
            self.fail(error, BAD_OPTIONS)

    def end(self) -> None:
        """Stop the test; without a web UI the program ends too."""
        runner = self._environment.runner
        if runner:
            # Not in the greenlet of a user, which this ends too.
            gevent.spawn(runner.stop if self._environment.web_ui else runner.quit)

    def _close(self) -> None:
        assert self._keeper  # noqa: S101 - `finish` has looked
        # One that ended before its part was done told its figures, but its other requests are not sent by anybody.
        self._lost = (self._ranks.keys() - self._summaries.keys()) | (self._lost - self._done)
        lost = sorted(self._ranks[node] for node in self._lost)
        if lost:
            names = ", ".join(map(str, lost))
            print(
                f"loadtest: lost: worker {names}; its unfinished requests have no record", file=sys.stderr, flush=True
            )
            self._environment.process_exit_code = WORKERS_LOST
        workers = [self._report(node) for node in self._ranks] if self._link else []
        if any(worker["lost_records"] for worker in workers):
            self._environment.process_exit_code = RECORDS_LOST
        try:
            complete = self._done >= self._ranks.keys() and not self._failed
            report = self._keeper.close(list(self._summaries.values()), lost, complete, workers)
            for reason in report["reasons"]:
                print(f"loadtest: the run is not valid: {reason}", file=sys.stderr, flush=True)
        except OSError as error:
            print(f"loadtest: the records are not whole: {error}", file=sys.stderr, flush=True)
            self._environment.process_exit_code = RECORDS_LOST

    def _report(self, node: str) -> dict[str, Any]:
        """Where a worker ran, how it was connected, and how many of its records are here."""
        assert self._link  # noqa: S101 - workers have a master
        ended = self._summaries.get(node, {}).get("requests_ended", {})
        lost = max(0, sum(ended.values()) - self._kept[node]) if not self._failed else 0
        own = {"worker": self._ranks[node], "records": self._kept[node], "lost_records": lost}
        return own | self._link.report(node)

    def _gone(self) -> set[str]:
        """The workers of the run that are no longer there."""
        if not self._master:
            return set()
        return self._ranks.keys() - {one.id for one in self._master.clients.values() if one.state != STATE_MISSING}

    def _watch(self) -> None:
        assert self._link  # noqa: S101 - only a master watches
        assert self._master  # noqa: S101
        while True:
            gevent.sleep(WATCH_SECONDS)
            self._link.look()
            if self._master.state == STATE_STOPPING:
                continue  # workers leave because they are told to
            self._lost = self._gone()
            if self._lost and self._done | self._lost >= self._ranks.keys():
                self.end()
                return


class FixedWorkers(UsersDispatcher):
    """Leaves each user of a run where it is: a worker that comes while it goes on waits for the next one.

    Locust would move users to it, and so cancel what they have under way.
    """

    def add_worker(self, worker_node: WorkerNode) -> None:
        """Not in this run."""

    def remove_worker(self, worker_node: WorkerNode) -> None:
        """Its users are not replaced: the others have their own shares of the requests."""


def install(environment: Environment, watcher: Watcher) -> Coordinator:
    """Connect a run to Locust's life: start, stop, and the messages between master and workers."""
    runner = environment.runner
    coordinator = Coordinator(environment, runner if isinstance(runner, MasterRunner) else None)
    events = environment.events
    settle_timeouts()
    environment.dispatcher_class = FixedWorkers
    if isinstance(runner, WorkerRunner):
        link = WorkerEnd(runner)
        worker = Sender(environment, link.tell, watcher)
        orders: list[dict[str, Any]] = []
        runner.register_message(PART, lambda msg, **_: orders.append(msg.data))
        runner.register_message(FINISH, lambda **_: runner.stop())
        events.test_start.add_listener(lambda **_: _start_worker(worker, link, orders))
        events.test_stop.add_listener(lambda **_: worker.finish())
        events.quitting.add_listener(lambda **_: _say_why(environment, link))
        # Before Locust's own listener, which says goodbye: the master waits for the figures of those that are there.
        events.quitting.add_listener(lambda **_: runner.stop())
        events.quit.add_listener(lambda **_: link.close())
    elif isinstance(runner, MasterRunner):
        events.test_start.add_listener(lambda **_: _share_out(environment, runner, coordinator))
        events.test_stop.add_listener(
            lambda **_: coordinator.finish(lambda node: runner.send_message(FINISH, {}, node))
        )
    else:
        local = Sender(environment, lambda kind, data: coordinator.hear("local", kind, data), watcher)
        events.test_start.add_listener(lambda **_: _start_here(environment, coordinator, local))
        events.test_stop.add_listener(lambda **_: coordinator.finish(lambda _: local.finish()))
    return coordinator


def _options(environment: Environment) -> Options:
    environment.host = None  # the form's field, which would stand for both servers from now on
    return check(vars(environment.parsed_options))


def reach(
    options: Options, kinds: Sequence[type[User]], users: int, nodes: Sequence[WorkerNode] | None = None
) -> dict[str, set[str]]:
    """The nodes, each with the targets that it can send to: in an open loop all, in a closed loop its users'.

    Without `nodes` it is this process, "local". Raises ValueError for a target without a user.
    """
    nodes = [WorkerNode("local")] if nodes is None else nodes
    targets = {kind.__name__: kind.target for kind in kinds if issubclass(kind, TargetUser)}
    if options.arrival != "closed":
        return {node.id: set(targets.values()) for node in nodes}
    # Where Locust is about to place the users, by its own dispatcher, which is the same whenever it is asked.
    dispatcher = FixedWorkers(list(nodes), list(kinds))
    dispatcher.new_dispatch(users, max(1, users))
    *_, placed = dispatcher
    senders = {node.id: {target for name, target in targets.items() if placed[node.id].get(name)} for node in nodes}
    if idle := set(targets.values()) - set().union(*senders.values()):
        names = ", ".join(sorted(idle))
        raise ValueError(
            f"users: {users}: in a closed loop expected at least one for each server, not none for {names}"
        )
    return senders


def _targets(environment: Environment) -> list[str]:
    return [kind.target for kind in environment.user_classes if issubclass(kind, TargetUser)]


def _say_why(environment: Environment, link: WorkerEnd) -> None:
    if link.is_cut_off:
        print(f"loadtest: the worker ends: no word from the master for {LOST_SECONDS} s", file=sys.stderr, flush=True)
        environment.process_exit_code = CUT_OFF


def _start_worker(worker: Sender, link: WorkerEnd, orders: list[dict[str, Any]]) -> None:
    if orders:  # else it came when the run was shared out already
        order = orders.pop()
        orders.clear()
        link.begin(order["run_id"])
        shares = {target: Share(**share) for target, share in order["shares"].items()}
        try:
            worker.start(Part(**order | {"shares": shares}))
        except ValueError as error:
            worker.end(error)


def _start_here(environment: Environment, coordinator: Coordinator, local: Sender) -> None:
    try:
        assert environment.runner  # noqa: S101 - it is what starts
        options, users = _options(environment), environment.runner.target_user_count
        senders = reach(options, environment.user_classes, users)
        local.start(coordinator.start(options, _targets(environment), senders)["local"])
    except (OSError, ValueError) as error:
        coordinator.refuse(error)


def _share_out(environment: Environment, master: MasterRunner, coordinator: Coordinator) -> None:
    try:
        options, clients = _options(environment), master.clients
        nodes = clients.ready + clients.running + clients.spawning
        senders = reach(options, environment.user_classes, master.target_user_count, nodes)
        parts = coordinator.start(options, _targets(environment), senders)
    except TimeoutError as error:
        coordinator.forget()
        coordinator.fail(error, WORKERS_LOST)
        return
    except (OSError, ValueError) as error:
        coordinator.refuse(error)
        return
    for node, part in parts.items():
        master.send_message(PART, asdict(part), node)
    coordinator.watch()
