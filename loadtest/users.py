"""Locust users: closed loop, each sends its next request when the last one has ended."""

import json
from typing import ClassVar

from locust import User, task
from locust.exception import StopUser

from loadtest.client import Connection
from loadtest.records import Record
from loadtest.run import Run


class RequestFailedError(Exception):
    """What Locust's table of failures shows: the error kind and its detail."""


class TargetUser(User):
    """A user of one server; `target` names it, and `current` is the run of the test in progress."""

    abstract = True
    target: ClassVar[str]
    current: ClassVar[Run | None] = None
    _connection: Connection

    def on_start(self) -> None:
        """Connect, and ask the server for its model's name unless it was given."""
        if self.current:
            options = self.current.options
            self._connection = Connection(getattr(options, f"{self.target}_url"), options.timeout)
            self._model = options.model or first_model(self._connection, self.target)

    def on_stop(self) -> None:
        """Close the connection."""
        if self.current:
            self._connection.close()

    @task
    def send(self) -> None:
        """Send the next request of the list; the user ends after the last."""
        request = self.current.next_request(self.target) if self.current else None
        if self.current is None or request is None:
            raise StopUser
        record = self.current.perform(self.target, request, self._connection, self._model)
        self._report(record)

    def _report(self, record: Record) -> None:
        """Count the request once in Locust's table; its response time there is the end-to-end latency, in ms."""
        end_ns = record.chunk_ns[-1] if record.chunk_ns else record.end_ns
        self.environment.events.request.fire(
            request_type="POST",
            name=f"{self.target} /v1/completions",
            response_time=(end_ns - record.sent_ns) / 1e6,
            response_length=0,
            exception=RequestFailedError(f"{record.error}: {record.error_detail}") if record.error else None,
            context={},
        )


class HF(TargetUser):
    """Users of the Hugging Face Transformers server."""

    target = "hf"


class VLLM(TargetUser):
    """Users of the vLLM server."""

    target = "vllm"


def first_model(connection: Connection, target: str) -> str:
    """Name of the first model that the server offers; when it does not say, requests will fail and show why."""
    answer = connection.get("/v1/models")
    try:
        return str(json.loads(answer.body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        return target
