"""Live statistics on Locust's own web server: the page "Servers", what it reads, and metrics for Prometheus."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import flask
from flask_cors import cross_origin
from locust.env import Environment
from locust.runners import (
    STATE_MISSING,
    STATE_RUNNING,
    STATE_SPAWNING,
    STATE_STOPPING,
    WORKER_REPORT_INTERVAL,
    MasterRunner,
    WorkerRunner,
)
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from loadtest.keeper import summary_of
from loadtest.live.metrics import LiveCollector
from loadtest.live.statistics import SHARES, WINDOW_SECONDS, Live
from loadtest.live.tally import METRICS, Tally

RecordsFile = Callable[[], Path | None]
View = Callable[..., flask.typing.ResponseReturnValue]

FOLDER = Path(__file__).parent
FILES = ("servers.css", "servers.js", "chart.js")
# A worker reports what it has every so often; a second's numbers are whole on the master after that and a little more.
MASTER_DELAY_SECONDS = int(WORKER_REPORT_INTERVAL) + 2
MESSAGE_KEY = "headroom_live"
READ_BYTES = 1 << 18
# Nothing of the page comes from, or goes to, another server, and no other page may frame it.
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
LINK = (
    "<style>body{padding-bottom:4rem}</style>"
    '<a href="./servers" style="position:fixed;left:16px;bottom:16px;z-index:2000;padding:8px 16px;border-radius:20px;'
    'background:#1b5fc1;color:#fff;font:600 15px system-ui,sans-serif;text-decoration:none">Servers: live charts</a>'
)


def install(environment: Environment, records_file: RecordsFile) -> Live:
    """Set up live statistics in a process of Locust, at its `init` event.

    Workers send theirs with their reports to the master, which merges them. Where there is a web server it gets
    /servers, /servers.json and /metrics. `records_file` names the file that the page offers for download.
    """
    runner = environment.runner
    events: Any = environment.events  # its functions have no types
    if isinstance(runner, WorkerRunner):
        live = Live("worker")
        events.report_to_master.add_listener(partial(_report, live))
    elif isinstance(runner, MasterRunner):
        live = Live("master", MASTER_DELAY_SECONDS)
        events.worker_report.add_listener(partial(_merge, live, runner))
    else:
        live = Live()
    if environment.web_ui:
        _Site(environment, live, records_file).add_to(environment.web_ui)
    return live


def _report(live: Live, data: dict[str, Any], **_: Any) -> None:
    data[MESSAGE_KEY] = live.report()


def _merge(live: Live, runner: MasterRunner, client_id: str, data: dict[str, Any], **_: Any) -> None:
    if MESSAGE_KEY in data:
        live.merge(_name(runner, client_id), data[MESSAGE_KEY])


def _name(runner: Any, client_id: str) -> str:
    return f"worker-{runner.get_worker_index(client_id)}"


class _Site:
    """What Locust's web server answers for us."""

    def __init__(self, environment: Environment, live: Live, records_file: RecordsFile):
        self._environment = environment
        self._live = live
        self._records_file = records_file
        self._registry = CollectorRegistry()
        LiveCollector(live, self._users, self._registry)

    def add_to(self, web_ui: Any) -> None:
        """Add the routes, behind Locust's login where it is on, and the links to them on Locust's own pages."""
        base = getattr(self._environment.parsed_options, "web_base_path", None)
        blueprint = flask.Blueprint("headroom", __name__, url_prefix=base or None)
        views: dict[str, View] = {
            "/servers": self._page,
            "/servers.json": self._numbers,
            "/servers/records": self._records,
            "/servers/<name>": self._file,
            "/metrics": self._metrics,
        }
        for rule, view in views.items():
            # Locust lets every site read its answers; ours are for pages of this server alone.
            guarded = cross_origin(origins=[])(web_ui.auth_required_if_enabled(view))
            blueprint.add_url_rule(rule, endpoint=view.__name__, view_func=guarded)
        blueprint.after_request(_secure)
        web_ui.app.register_blueprint(blueprint)
        web_ui.app.after_request(_link)
        web_ui.template_args["extended_csv_files"] = [
            *web_ui.template_args.get("extended_csv_files", []),
            {"href": "./servers/records", "title": "Download records"},
        ]

    def _page(self) -> flask.Response:
        return flask.send_file(FOLDER / "servers.html")

    def _file(self, name: str) -> flask.typing.ResponseReturnValue:
        return flask.send_file(FOLDER / name) if name in FILES else (f"no file {name!r}", 404)

    def _numbers(self) -> flask.typing.ResponseReturnValue:
        since = flask.request.args.get("since", "-1")
        try:
            after = int(since)
        except ValueError:
            return f"since: {since!r}: expected a whole number, a second of the test", 400
        return flask.Response(json.dumps(self._snapshot(after), separators=(",", ":")), mimetype="application/json")

    def _snapshot(self, since: int) -> dict[str, Any]:
        self._drop_lost_workers()
        runner, records = self._environment.runner, self._records_file()
        state = runner.state if runner else STATE_MISSING
        running = state in (STATE_SPAWNING, STATE_RUNNING, STATE_STOPPING)
        points = self._live.points(since, running)
        return {
            "state": state,
            "running": running,
            "users": self._users(),
            "started": self._live.started,
            "window_seconds": WINDOW_SECONDS,
            "points": [asdict(point) for point in points],
            "run": {target: _summary(tally) for target, tally in sorted(self._live.run.items())},
            "clients": {name: asdict(client) for name, client in sorted(self._live.clients.items())},
            "records": records.name if records and records.exists() else None,
            "judgement": None if running or not records else _judgement(records),
        }

    def _records(self) -> flask.typing.ResponseReturnValue:
        path = self._records_file()
        if path is None or not path.exists():
            return "no records yet: start a test first", 404
        # The file may grow meanwhile; what it holds now is what is sent.
        size = path.stat().st_size
        response = flask.Response(_read(path, size), mimetype="application/octet-stream")
        response.content_length = size
        response.headers.set("Content-Disposition", "attachment", filename=path.name)
        return response

    def _metrics(self) -> flask.Response:
        self._drop_lost_workers()
        return flask.Response(generate_latest(self._registry), content_type=CONTENT_TYPE_LATEST)

    def _users(self) -> int:
        return self._environment.runner.user_count if self._environment.runner else 0

    def _drop_lost_workers(self) -> None:
        runner = self._environment.runner
        if isinstance(runner, MasterRunner):
            here = {_name(runner, worker.id) for worker in runner.clients.values() if worker.state != STATE_MISSING}
            for name in self._live.processes() - here - {self._live.name}:
                self._live.forget(name)


def _judgement(records: Path) -> dict[str, Any] | None:
    """What the load generator says of a run, once it has closed its files."""
    try:
        told = json.loads(summary_of(records).read_text())
    except (OSError, ValueError):
        return None
    if not told["run"]["ended"]:
        return None
    return {name: told[name] for name in ("complete", "valid", "reasons")}


def _summary(tally: Tally) -> dict[str, Any]:
    return {
        "outcomes": tally.outcomes,
        "in_flight": tally.in_flight,
        "prompt_tokens": tally.prompt_tokens,
        "output_tokens": tally.output_tokens,
        "measured": tally.times["e2e"].count if "e2e" in tally.times else 0,
        "times": {metric: tally.percentiles(metric, *SHARES) for metric in METRICS},
    }


def _read(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while size > 0 and (piece := file.read(min(READ_BYTES, size))):
            size -= len(piece)
            yield piece


def _secure(response: flask.Response) -> flask.Response:
    response.headers.update(SECURITY)
    return response


def _link(response: flask.Response) -> flask.Response:
    """Put a link to the page on Locust's first page, which has no place for one of its own."""
    if flask.request.endpoint == "locust.index" and response.status_code == 200:
        response.set_data(response.get_data(as_text=True).replace("</body>", f"{LINK}</body>"))
    return response
