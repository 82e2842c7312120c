"""The rules that make a comparison valid, each with what was found. Evidence that is missing fails a rule."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiment.analysis import stats, steady
from experiment.analysis.results import JSON, CellResult, Results, pairs, targets
from experiment.analysis.steady import Steady

# More than these are not listed one by one.
LISTED = 20


def judge(results: Results, measured: Mapping[int, Steady]) -> Iterator[JSON]:
    """Hold a run against each rule: its `id`, its name as `rule`, whether it `passed`, and what was `found`.

    `measured` is what happened inside the window of each cell, by its index. The cells of a search for the saturation
    are there to be overloaded, and are stopped when they are: of them only the load generator's speed is judged.
    """
    cells = [cell for cell in results.cells if not cell.search]
    planned = [
        (level, repeat + 1, target)
        for level in results.plan["levels"]
        for repeat in range(results.plan["repeats"])
        for target in targets(results.plan)
    ]
    whole = {(c.level, c.repeat, c.target): c for c in cells if c.complete and _has_all_records(c)}
    missing = [
        f"{target} at {_where(results.plan, level)}, repeat {repeat}"
        for level, repeat, target in planned
        if (level, repeat, target) not in whole
    ]
    found = f"missing or short: {'; '.join(missing)}" if missing else f"{len(whole)} of {len(planned)}"
    yield _gate("cells", "every planned cell was run, and each of its requests has a record", not missing, found)

    failed = stats.errors_by_kind(np.concatenate([np.empty(0, np.int64), *(cell.requests.error for cell in cells)]))
    kinds = ", ".join(f"{count} {kind}" for kind, count in failed.items()) or "none failed"
    yield _gate("answered", "every request was answered", not failed, kinds)
    yield _same_work(results.plan, list(whole.values()))
    yield _nothing_drifted(results.plan, measured)
    yield _client_came_to_its_end(cells)
    # The load generator stands still while it is stopped.
    yield _client_was_fast_enough([cell for cell in results.cells if not cell.stopped_early])


def _where(plan: JSON, level: float) -> str:
    return f"concurrency {level:g}" if plan["arrival"] == "closed" else f"{level:g} requests/s"


def _has_all_records(cell: CellResult) -> bool:
    return len(np.unique(cell.requests.index)) == len(cell.requests) == cell.planned_requests


def _same_work(plan: JSON, whole: Sequence[CellResult]) -> JSON:
    different, compared = [], 0
    baseline, *others = targets(plan)
    for level in plan["levels"]:
        own = [cell for cell in whole if cell.level == level]
        for first, second in (pair for other in others for pair in pairs(own, baseline, other)):
            compared += len(first.requests)
            unequal = stats.different_work(first.requests, second.requests)
            who = f" of {second.target}" if len(others) > 1 else ""
            different += [f"{_where(plan, level)} repeat {first.repeat} request {index}{who}" for index in unequal]
    if not others:
        return _gate("same-work", "all servers did the same work", True, "one server alone")
    found = f"{compared} pairs, equal prompt and output tokens" if not different else "; ".join(different[:LISTED])
    passed = compared > 0 and not different
    return _gate("same-work", "all servers did the same work", passed, found if compared else "no pairs")


def _nothing_drifted(plan: JSON, measured: Mapping[int, Steady]) -> JSON:
    """In an open loop a queue that grows is a finding, which takes the verdicts on latency of its level alone."""
    told = [f"cell {index}: {drift}" for index, drift in steady.drifts(measured).items()]
    closed = plan["arrival"] == "closed"
    judged = sum(bool(cell.trends) for cell in measured.values())
    found = "; ".join(told[:LISTED]) or f"no trend; {judged} of {len(measured)} cells were long enough to tell"
    if told and not closed:
        found += "; an open loop may be over-saturated: the latencies of that level have no verdict"
    return _gate("no-drift", "no cell drifted", not told or not closed, found)


def _client_came_to_its_end(cells: Sequence[CellResult]) -> JSON:
    stopped = [str(cell.index) for cell in cells if cell.client and not cell.client["complete"]]
    against = _silent(cells) + ([f"not in cell {', '.join(stopped)}"] if stopped else [])
    rule = "the load generator sent all requests and waited for every answer"
    return _gate("client-complete", rule, not against, "; ".join(against) or f"in all {len(cells)} cells")


def _client_was_fast_enough(cells: Sequence[CellResult]) -> JSON:
    """What the load generator says of itself; its limits are its own."""
    judged = [(cell.index, cell.client) for cell in cells if cell.client]
    against = _silent(cells)
    against += [f"cell {index}: {', '.join(client['reasons'])}" for index, client in judged if not client["valid"]]
    found = against[:LISTED] or [_worst([client for _, client in judged])]
    if not all(client["goes_first"] for _, client in judged):
        found.append("Linux did not let it run before the servers: root and CAP_SYS_NICE may")
    return _gate("client-fast", "the load generator was fast enough, by its own check", not against, "; ".join(found))


def _silent(cells: Sequence[CellResult]) -> list[str]:
    """What is missing to know how the load generator did."""
    silent = [str(cell.index) for cell in cells if not cell.client]
    return ["no cells"] if not cells else [f"no self-check in cell {', '.join(silent)}"] if silent else []


def _worst(clients: Sequence[JSON]) -> str:
    cpu, lag, late = (
        max((client[name] for client in clients if client[name] is not None), default=None)
        for name in ("cpu_share", "loop_lag_p99_seconds", "send_lateness_p99_seconds")
    )
    told = [f"{cpu:.0%} of a core"] if cpu is not None else []
    told += [f"loop lag p99 {lag * 1e3:.1f} ms"] if lag is not None else []
    told += [f"send lateness p99 {late * 1e3:.1f} ms"] if late is not None else []
    return f"at most {', '.join(told)}" if told else "nothing against it"


def _gate(name: str, rule: str, passed: bool, found: str) -> JSON:
    return {"id": name, "rule": rule, "passed": passed, "found": found}
