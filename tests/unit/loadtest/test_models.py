"""Which model a run asks for where its options name none."""

import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import gevent
import pytest

from loadtest import models
from loadtest.models import first_models
from loadtest.options import Options


class Handler(BaseHTTPRequestHandler):
    """Answers by the path that the address has."""

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {
        "/v1/models": (200, b'{"data": [{"id": "first"}, {"id": "second"}]}'),
        "/without/v1/models": (404, b'{"detail": "Not Found"}'),
        "/none/v1/models": (200, b'{"data": []}'),
        "/empty/v1/models": (200, b'{"data": [{"id": ""}]}'),
    }
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        Handler.asked.append((self.path, self.headers["Authorization"]))
        status, body = Handler.answers[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(5)


def test_each_server_is_asked_once_with_its_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADROOM_HF_API_KEY", "sesame")
    assert first_models(Options(hf_url=url, vllm_url=url), ["hf", "vllm"]) == {"hf": "first", "vllm": "first"}
    assert sorted(Handler.asked, key=str) == [("/v1/models", "Bearer sesame"), ("/v1/models", None)]


def test_none_is_asked_where_an_option_names_the_model(url: str) -> None:
    assert first_models(Options(hf_url=url, model="m"), ["hf"]) == {}
    assert Handler.asked == []


@pytest.mark.parametrize(
    ("path", "problem"),
    [("without", "status 404"), ("none", "an answer without data[0].id"), ("empty", "its name is empty")],
)
def test_a_server_that_does_not_say_its_models_is_named_with_what_helps(url: str, path: str, problem: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of the message is below
        first_models(Options(hf_url=f"{url}/{path}", vllm_url=url), ["hf", "vllm"])
    place = f"hf_url: '{url}/{path}': GET /v1/models: {problem}"
    assert str(refused.value) == f"{place}; expected the name of a model, or --model NAME"


def test_a_server_that_is_not_there_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ValueError, match=r"^hf_url: .*: connect: .*refused"):
        first_models(Options(hf_url=address), ["hf"])


def test_servers_that_hold_the_answer_are_waited_for_together_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(ValueError, match=r"hf_url: .*no answer after 0.3 s; vllm_url: .*no answer after 0.3 s"):
            first_models(Options(hf_url=address, vllm_url=address), ["hf", "vllm"])
        assert time.monotonic() - begun < 2


def test_a_run_that_is_stopped_meanwhile_does_not_wait_for_the_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        asking = gevent.spawn(first_models, Options(hf_url=address), ["hf"])
        gevent.sleep(0.1)
        begun = time.monotonic()
        asking.kill()
        assert time.monotonic() - begun < 2
