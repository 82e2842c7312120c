"""Users that make records up instead of asking servers, for the tests of the live view."""

import os
import random
import time
from pathlib import Path
from typing import Any, ClassVar

import gevent
import locust
from locust import User, task
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtest.live.page import install
from loadtest.live.statistics import Live
from loadtest.records import Record

RECORDS = Path("records.txt")
events: Any = locust.events


class State:
    """What the users share."""

    live: Live
    sent = 0


def _arguments(parser: Any) -> None:
    parser.set_defaults(web_host="127.0.0.1", class_picker=True)


def _init(environment: Environment, **_: Any) -> None:
    State.live = install(environment, lambda: RECORDS)
    if not isinstance(environment.runner, locust.runners.MasterRunner):
        gevent.spawn(_watch)
    web_ui: Any = environment.web_ui
    if web_ui and web_ui.web_login:
        web_ui.app.secret_key = os.urandom(16)
        web_ui.login_manager.user_loader(lambda _: None)


def _watch() -> None:
    while True:
        gevent.sleep(0.5)
        State.live.client(cpu_share=0.25, lag_p99=0.001)


def _start(environment: Environment, **_: Any) -> None:
    State.live.reset()
    if not isinstance(environment.runner, WorkerRunner):
        RECORDS.write_text("")


events.init_command_line_parser.add_listener(_arguments)
events.init.add_listener(_init)
events.test_start.add_listener(_start)


class Made(User):
    """Every fifth request of a process fails if its target `fails`."""

    abstract = True
    target: ClassVar[str]
    ttft: ClassVar[float]
    fails = False

    @task
    def send(self) -> None:
        """Wait as long as a server would take and make the record."""
        State.live.begin(self.target)
        State.sent += 1
        sent_ns = time.monotonic_ns()
        fields: dict[str, Any] = {
            "index": State.sent, "target": self.target, "phase": "measured", "max_tokens": 10,
            "scheduled_ns": sent_ns - 1_000_000, "sent_ns": sent_ns, "prompt_tokens": 20,
        }  # fmt: skip
        ttft = random.uniform(0.9, 1.1) * self.ttft
        try:
            gevent.sleep(2 * ttft)
        except gevent.GreenletExit:
            self._keep(Record(**fields, end_ns=time.monotonic_ns(), error="cancelled"))
            raise
        fields["end_ns"] = time.monotonic_ns()
        if self.fails and State.sent % 5 == 0:
            self._keep(Record(**fields, error="timeout"))
        else:
            chunks = [sent_ns + int(ttft * 1e9), sent_ns + int(2 * ttft * 1e9)]
            self._keep(Record(**fields, output_tokens=10, chunk_ns=chunks))

    def _keep(self, record: Record) -> None:
        State.live.add(record)
        with RECORDS.open("a") as file:
            file.write(f"{record.target} {record.error}\n")


class HF(Made):
    """A slow server, some of whose requests fail."""

    target, ttft, fails = "hf", 0.2, True


class VLLM(Made):
    """A fast server."""

    target, ttft = "vllm", 0.05
