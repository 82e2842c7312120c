"""Locust users. In a closed loop each sends its next request when the last one has ended; in an open loop they idle."""

from typing import ClassVar

import gevent
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from loadtest.live.statistics import Live
from loadtest.records import Record
from loadtest.run import Run


class RequestFailedError(Exception):
    """What Locust's table of failures shows: the error kind and its detail."""


class TargetUser(User):
    """A user of one server; `target` names it, and `current` is this process's part of the test in progress."""

    abstract = True
    target: ClassVar[str]
    current: ClassVar[Run | None] = None

    @task
    def send(self) -> None:
        """Send the next request of the list; the user ends after the last."""
        run = self.current
        if run and run.options.arrival != "closed":
            gevent.sleep(3600)  # requests arrive by themselves
            return
        request = run.next_request(self.target) if run else None
        if run is None or request is None:
            raise StopUser
        run.perform(self.target, request)


class HF(TargetUser):
    """Users of the Hugging Face Transformers server."""

    target = "hf"


class VLLM(TargetUser):
    """Users of the vLLM server."""

    target = "vllm"


class Table:
    """Passes on what a run shows of itself, and counts each request once in Locust's table."""

    def __init__(self, environment: Environment, live: Live):
        self._environment, self._live = environment, live
        self.begin, self.client = live.begin, live.client

    def add(self, record: Record) -> None:
        """Count a request; its response time in the table is the end-to-end latency, in ms; one that failed has none.

        One that was cut off by the end of the test is a record, but neither a success nor a failure of the server.
        """
        self._live.add(record)
        if record.error == "cancelled":
            return
        latency = record.e2e_seconds
        self._environment.events.request.fire(
            request_type="POST",
            name=record.target,
            response_time=None if latency is None else latency * 1e3,
            response_length=0,
            exception=RequestFailedError(f"{record.error}: {record.error_detail}") if record.error else None,
            context={},
        )
