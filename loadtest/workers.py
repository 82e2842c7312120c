"""A run over Locust's processes: the one that keeps the records, and those that send requests.

Without workers both are the same process. With workers the master gives each a share of the requests; they pass their
records on, so that the run leaves one file, and the records of a worker that is killed are kept but for the last half
second.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

from loadtest.keeper import Keeper
from loadtest.options import Options, check
from loadtest.run import Part, Run, Share, Watcher, whole
from loadtest.users import TargetUser

PART, RECORDS, DONE, FINISH, FINISHED = (
    f"headroom_{name}" for name in ("part", "records", "done", "finish", "finished")
)
BAD_OPTIONS, RECORDS_LOST, WORKERS_LOST = 2, 3, 4
FINISH_SECONDS = 10.0
WATCH_SECONDS = 0.5


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

    def __init__(self, environment: Environment):
        self._environment = environment
        self._keeper: Keeper | None = None
        self._ranks: dict[str, int] = {}
        self._failed = False
        self._done: set[str] = set()
        self._summaries: dict[str, dict[str, Any]] = {}
        self._lost: set[str] = set()
        self._watcher: gevent.Greenlet[..., None] | None = None

    @property
    def path(self) -> Path | None:
        """The file of records of the latest run."""
        return self._keeper.path if self._keeper else None

    def start(self, options: Options, targets: Sequence[str], senders: dict[str, set[str]]) -> dict[str, Part]:
        """Open the records' file and share the run out; raises OSError.

        `senders`: the nodes, each with the targets that it can send to.
        """
        self.forget()
        self._keeper = Keeper(options)
        self._ranks = {node: rank for rank, node in enumerate(senders)}
        self._done, self._summaries, self._lost = set(), {}, set()
        print(f"loadtest: records go to {self._keeper.path}", flush=True)
        shares: dict[str, dict[str, Share]] = {node: {} for node in senders}
        for target in targets:
            able = [node for node, reached in senders.items() if target in reached]
            for rank, node in enumerate(able):
                shares[node][target] = Share(rank, len(able))
        run = whole(targets)
        return {node: replace(run, shares=shares[node], worker=rank) for node, rank in self._ranks.items()}

    def forget(self) -> None:
        """Have nothing to finish: no run, or one that did not begin."""
        self._keeper, self._ranks, self._failed = None, {}, False

    def hear(self, node: str, kind: str, data: Any) -> None:
        """Take what a sender tells."""
        if node not in self._ranks or not self._keeper:
            return  # of an earlier run
        if kind == RECORDS:
            if self._failed:
                return
            try:
                self._keeper.write(data)
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

    def watch(self, master: MasterRunner) -> None:
        """Notice workers that were lost while the run goes on."""
        self._watcher = gevent.spawn(self._watch, master)

    def finish(self, ask: Callable[[str], None]) -> None:
        """Close the files once each sender that is left has passed on its last records; `ask` asks one for them."""
        if self._watcher:
            self._watcher.kill()
            self._watcher = None
        if not self._keeper:
            return
        waiting = self._ranks.keys() - self._summaries.keys() - self._lost
        for node in waiting:
            ask(node)
        deadline = time.monotonic() + FINISH_SECONDS
        while time.monotonic() < deadline and not self._summaries.keys() | self._lost >= self._ranks.keys():
            gevent.sleep(0.02)
        self._close()

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
        lost = sorted(self._ranks[node] for node in self._ranks.keys() - self._summaries.keys())
        if lost:
            names = ", ".join(map(str, lost))
            print(
                f"loadtest: lost: worker {names}; its unfinished requests have no record", file=sys.stderr, flush=True
            )
            self._environment.process_exit_code = WORKERS_LOST
        try:
            complete = self._done >= self._ranks.keys() and not self._failed
            report = self._keeper.close(list(self._summaries.values()), lost, complete)
            for reason in report["reasons"]:
                print(f"loadtest: the run is not valid: {reason}", file=sys.stderr, flush=True)
        except OSError as error:
            print(f"loadtest: the records are not whole: {error}", file=sys.stderr, flush=True)
            self._environment.process_exit_code = RECORDS_LOST

    def _watch(self, master: MasterRunner) -> None:
        while True:
            gevent.sleep(WATCH_SECONDS)
            there = {node.id for node in master.clients.values() if node.state != STATE_MISSING}
            self._lost = self._ranks.keys() - there
            if self._lost and self._done | self._lost >= self._ranks.keys():
                self.end()
                return


def install(environment: Environment, watcher: Watcher) -> Coordinator:
    """Connect a run to Locust's life: start, stop, and the messages between master and workers."""
    runner = environment.runner
    coordinator = Coordinator(environment)
    events = environment.events
    if isinstance(runner, WorkerRunner):
        worker = Sender(environment, lambda kind, data: runner.send_message(kind, {"data": data}), watcher)
        orders: list[dict[str, Any]] = []
        runner.register_message(PART, lambda msg, **_: orders.append(msg.data))
        runner.register_message(FINISH, lambda **_: runner.stop())
        events.test_start.add_listener(lambda **_: _start_worker(worker, orders))
        events.test_stop.add_listener(lambda **_: worker.finish())
    elif isinstance(runner, MasterRunner):
        for kind in (RECORDS, DONE, FINISHED):
            runner.register_message(kind, lambda msg, **_: coordinator.hear(msg.node_id, msg.type, msg.data["data"]))
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


def _senders(
    environment: Environment, master: MasterRunner, options: Options, targets: list[str]
) -> dict[str, set[str]]:
    """The workers, each with the targets that it can send to: in an open loop all, in a closed loop its users'.

    Raises ValueError for a target without a user.
    """
    clients = master.clients
    workers = clients.ready + clients.running + clients.spawning
    if options.arrival != "closed":
        return {worker.id: set(targets) for worker in workers}
    # Where Locust is about to place the users, by its own dispatcher, which is the same whenever it is asked.
    dispatcher = environment.dispatcher_class(workers, environment.user_classes)
    dispatcher.new_dispatch(master.target_user_count, max(1, master.target_user_count))
    *_, placed = dispatcher
    kinds = {kind.__name__: kind.target for kind in environment.user_classes if issubclass(kind, TargetUser)}
    senders = {
        worker.id: {target for name, target in kinds.items() if placed[worker.id].get(name)} for worker in workers
    }
    if idle := set(targets) - set().union(*senders.values()):
        users = master.target_user_count
        names = ", ".join(sorted(idle))
        raise ValueError(
            f"users: {users}: in a closed loop expected at least one for each server, not none for {names}"
        )
    return senders


def _targets(environment: Environment) -> list[str]:
    return [kind.target for kind in environment.user_classes if issubclass(kind, TargetUser)]


def _start_worker(worker: Sender, orders: list[dict[str, Any]]) -> None:
    if orders:  # else it came when the run was shared out already
        order = orders.pop()
        orders.clear()
        shares = {target: Share(**share) for target, share in order["shares"].items()}
        try:
            worker.start(Part(**order | {"shares": shares}))
        except ValueError as error:
            worker.end(error)


def _start_here(environment: Environment, coordinator: Coordinator, local: Sender) -> None:
    try:
        targets = _targets(environment)
        local.start(coordinator.start(_options(environment), targets, {"local": set(targets)})["local"])
    except (OSError, ValueError) as error:
        coordinator.refuse(error)


def _share_out(environment: Environment, master: MasterRunner, coordinator: Coordinator) -> None:
    try:
        options, targets = _options(environment), _targets(environment)
        parts = coordinator.start(options, targets, _senders(environment, master, options, targets))
    except (OSError, ValueError) as error:
        coordinator.refuse(error)
        return
    for node, part in parts.items():
        master.send_message(PART, asdict(part), node)
    coordinator.watch(master)
