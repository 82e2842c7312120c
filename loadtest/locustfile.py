"""`locust -f loadtest/locustfile.py`: load for the HF server and the vLLM server, from the web UI or headless."""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import flask
import gevent
from locust import events
from locust.env import Environment
from locust.runners import STATE_RUNNING, STATE_SPAWNING
from werkzeug.datastructures import MultiDict

from loadtest import workers
from loadtest.live import page
from loadtest.models import first_models
from loadtest.options import Options, add_arguments, check, check_variables
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
        check_variables(os.environ)
        options = check(vars(environment.parsed_options))
        _check_files(options)
    except ValueError as error:
        _leave(str(error))
    _show_hosts(options)
    live = page.install(environment, lambda: coordinator.path)
    environment.events.test_start.add_listener(lambda **_: live.reset())
    coordinator = workers.install(environment, Table(environment, live))
    if environment.web_ui and environment.web_ui.app:
        environment.web_ui.app.before_request(lambda: _check_form(environment, coordinator))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _heed_one_interrupt()


def _heed_one_interrupt() -> None:
    """End the run at the first interrupt, as Locust does; another, while the files are closed, would lose them."""
    main = gevent.getcurrent()

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gevent.kill(main, KeyboardInterrupt())  # not in whatever greenlet has its turn

    signal.signal(signal.SIGINT, interrupt)


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


def _check_form(environment: Environment, coordinator: workers.Coordinator) -> flask.Response | None:
    """Refuse a form with a bad value before Locust reads it; the page shows the message."""
    form = flask.request.form
    if not flask.request.path.endswith("/swarm"):
        return None
    try:
        # What the form leaves out stays as it is.
        options = check(vars(environment.parsed_options) | form.to_dict())
        _show_hosts(options)
        if form.get("host", "") not in ("", options.hf_url, options.vllm_url):
            raise ValueError(f"host: {form['host']!r}: leave it empty; each user class has a server: hf_url, vllm_url")
        _check_files(options)
        if environment.runner and environment.runner.state not in (STATE_SPAWNING, STATE_RUNNING):
            if not coordinator.wait_until_over():
                raise ValueError("the last test has not come to its end: start the next one later")
            _check_start(options, form)
    except ValueError as error:
        return flask.jsonify({"success": False, "message": str(error), "host": None})
    return None


def _check_start(options: Options, form: MultiDict[str, str]) -> None:
    """Raise ValueError where a run that is about to start could not."""
    if options.records and Path(options.records).exists():
        raise ValueError(f"records: {options.records!r} exists; name a new file")
    chosen = form.getlist("user_classes")
    kinds = [kind for kind in (HF, VLLM) if kind.__name__ in chosen or not chosen]
    if (users := form.get("user_count", "")).isdecimal():  # Locust refuses others
        workers.reach(options, kinds, int(users))
    first_models(options, [kind.target for kind in kinds])
