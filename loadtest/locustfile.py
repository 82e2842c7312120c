"""`locust -f loadtest/locustfile.py`: load for the HF server and the vLLM server, from the web UI or headless."""

import sys
from pathlib import Path
from typing import Any, NoReturn

import flask
from locust import events
from locust.env import Environment

from loadtest import workers
from loadtest.live import page
from loadtest.options import Options, add_arguments, check
from loadtest.users import HF, VLLM, Table
from loadtest.work.schedule import schedule
from loadtest.work.workloads import WORKLOADS


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    add_arguments(parser)
    # Bound to this machine, and with the picker that chooses the server, unless told otherwise.
    parser.set_defaults(web_host="127.0.0.1", class_picker=True)


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    try:
        options = check(vars(environment.parsed_options))
        _check_files(options)
    except ValueError as error:
        _leave(str(error))
    _show_hosts(options)
    live = page.install(environment, lambda: coordinator.path)
    environment.events.test_start.add_listener(lambda **_: live.reset())
    coordinator = workers.install(environment, Table(environment, live))
    if environment.web_ui and environment.web_ui.app:
        environment.web_ui.app.before_request(_check_form)


def _show_hosts(options: Options) -> None:
    """What the page shows of each user class; users take the address from the options."""
    HF.host, VLLM.host = options.hf_url, options.vllm_url


def _check_files(options: Options) -> None:
    """Read what the run will read; raises ValueError."""
    WORKLOADS[options.workload](options)
    schedule(options)


def _leave(message: str) -> NoReturn:
    print(f"loadtest: {message}", file=sys.stderr, flush=True)
    sys.exit(workers.BAD_OPTIONS)


def _check_form() -> flask.Response | None:
    """Refuse a form with a bad value before Locust reads it; the page shows the message."""
    form = flask.request.form
    if not flask.request.path.endswith("/swarm"):
        return None
    try:
        options = check(form)
        _show_hosts(options)
        if form.get("host", "") not in ("", options.hf_url, options.vllm_url):
            raise ValueError(f"host: {form['host']!r}: leave it empty; each user class has a server: hf_url, vllm_url")
        _check_files(options)
        if options.records and Path(options.records).exists():
            raise ValueError(f"records: {options.records!r} exists; name a new file")
    except ValueError as error:
        return flask.jsonify({"success": False, "message": str(error), "host": None})
    return None
