"""What happens between cells: a rest, servers that have nothing to do any more, and no prefix left in a cache."""

import re
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from experiment.plan.plan import Plan
from experiment.run import kv
from experiment.run.stack import Program, Remote, RunError, Stack, get

IDLE_SECONDS = 60
TIMEOUT_SECONDS = 10
# Tokens of prompts that vLLM looked for in its prefix cache, and found there.
_PREFIX_TOKENS = re.compile(r"^vllm:prefix_cache_(queries|hits)_total(?:\{.*\})? (\S+)$", re.MULTILINE)


def settle(plan: Plan, stack: Stack) -> dict[str, Any]:
    """Rest, wait until every server is idle and empty their prefix caches; returns what cell.json keeps of that.

    `waited_seconds`; and by target `prefix_cache`: off, reset, on (it cannot be reset) or unknown. Raises RunError.
    """
    time.sleep(plan.cooldown_seconds)
    started = time.monotonic()
    servers = {target.name: stack[target.name] for target in plan.targets if target.name in stack}
    told = {target.name for target in plan.targets if target.kind != "url"}
    rows = {name: _wait_until_idle(program, stack, name in told) for name, program in servers.items()}
    caches = {name: _prefix_cache(servers[name], row) for name, row in rows.items()}
    return {"waited_seconds": time.monotonic() - started, "prefix_cache": caches}


def _wait_until_idle(program: Program | Remote, stack: Stack, tells: bool) -> kv.Row | None:
    """The sample of a server that neither runs a request nor has one waiting; None where it does not say.

    One of ours or vLLM `tells`: no answer may mean that it is busy.
    """
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        row = _sample(program)
        busy = int(row["running"] or 0) + int(row["waiting"] or 0) if row else 0
        if not busy and (row or not tells):
            return row
        stack.check()
        if time.monotonic() > deadline:
            if not row:
                raise RunError(f"{program.name} did not tell in {program.url}/metrics whether it is idle")
            raise RunError(
                f"{program.name} still has {busy} requests after {IDLE_SECONDS} s without load: "
                "another client uses it, or it does not notice that a client has gone"
            )
        time.sleep(0.2)


def _sample(program: Program | Remote) -> kv.Row | None:
    body = get(program.url + "/metrics", TIMEOUT_SECONDS)
    try:
        return kv.parse(body.decode()) if body else None
    except ValueError:
        return None


def _prefix_cache(program: Program | Remote, row: kv.Row | None) -> str:
    if row is None:
        return "unknown"
    if not row.get("prefix_caching"):
        return "off"
    request = urllib.request.Request(program.url + "/reset_prefix_cache", method="POST")  # noqa: S310 - our own
    with suppress(OSError), urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):  # noqa: S310
        return "reset"
    return "on"


def prefix_tokens(server: Program | Remote) -> dict[str, int] | None:
    """Prompt tokens that a server has looked for in its prefix cache since its start (`queries`) and found (`hits`).

    They are summed over its engines; None where it does not say.
    """
    body = get(server.url + "/metrics", TIMEOUT_SECONDS) or b""
    found: dict[str, int] = {}
    for name, value in _PREFIX_TOKENS.findall(body.decode(errors="replace")):
        found[name] = found.get(name, 0) + int(float(value))
    return found if len(found) == 2 else None


def since(before: Mapping[str, int] | None, now: Mapping[str, int] | None) -> dict[str, int] | None:
    """How far counters have come; None where one of the counts is not known."""
    return {name: now[name] - before[name] for name in now} if before and now else None
