"""The rules that make a comparison valid, each with what was found.

A rule fails when something was found against it or the evidence that every run leaves is missing. It is `not judged`
when a run without fault may leave none: cells too short for a trend, servers that do not say what a rule asks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from experiment.analysis import stats, steady
from experiment.analysis.requests import SOURCES
from experiment.analysis.results import JSON, CellResult, Results, goes_on, pairs, targets
from experiment.analysis.steady import Steady

# More than these are not listed one by one.
LISTED = 20


def judge(results: Results, measured: Mapping[int, Steady]) -> Iterator[JSON]:
    """Hold a run against each rule: its `id`, whether it `passed`, and what was `found`: findings with their values.

    `passed` is None for a rule that could not be judged.

    `measured` is what happened inside the window of each cell, by its index. The cells of a search for the saturation
    are there to be overloaded, and are stopped when they are: of them only the load generator's speed is judged.
    """
    cells = [cell for cell in results.cells if not cell.search]
    whole = {(c.level, c.repeat, c.target): c for c in cells if c.complete and _has_all_records(c)}
    yield _all_were_run(results.plan, whole.keys())
    failed = stats.errors_by_kind(np.concatenate([np.empty(0, np.int64), *(cell.requests.error for cell in cells)]))
    kinds = [_finding("failed", count=count, kind=kind) for kind, count in failed.items()]
    yield _gate("answered", against=kinds, otherwise=[_finding("none_failed")])
    yield _tokens_were_counted(cells)
    yield _same_work(results.plan, list(whole.values()))
    yield _no_cache_was_borrowed(results.cells)
    if results.plan["together"]:
        yield _loaded_together(list(whole.values()), measured)
    yield _nothing_drifted(results.plan, measured, list(whole.values()))
    yield _client_came_to_its_end(cells)
    # The load generator stands still while it is stopped.
    yield _client_was_fast_enough(results.plan, [cell for cell in results.cells if not cell.stopped_early])


def _all_were_run(plan: JSON, whole: Collection[tuple[float, int, str]]) -> JSON:
    planned = list(product(plan["levels"], range(1, plan["repeats"] + 1), targets(plan)))
    missing = [
        _finding("missing", level=level, repeat=repeat, target=target)
        for level, repeat, target in planned
        if (level, repeat, target) not in whole
    ]
    return _gate("cells", against=missing, otherwise=[_finding("cells_run", run=len(whole), planned=len(planned))])


def _has_all_records(cell: CellResult) -> bool:
    return len(np.unique(cell.requests.index)) == len(cell.requests) == cell.planned_requests


def _tokens_were_counted(cells: Sequence[CellResult]) -> JSON:
    """A count that is max_tokens, because the server says that the output ended there, proves nothing."""
    sources = np.concatenate([np.empty(0, np.int64), *(c.requests.token_source[c.requests.answered] for c in cells)])
    counts = dict(zip(SOURCES, np.bincount(sources, minlength=len(SOURCES)).tolist(), strict=True))
    against = [_finding("uncounted", count=counts["unknown"])] if counts["unknown"] else []
    unknown = [_finding("fallback", count=counts["max_tokens"])] if counts["max_tokens"] else []
    told = [_finding("counted", count=counts["usage"] + counts["token_ids"])]
    return _gate("tokens-counted", against=against, unknown=unknown, otherwise=told)


def _no_cache_was_borrowed(cells: Sequence[CellResult]) -> JSON:
    """A prefix cache that was kept from cell to cell, or from run to run, may hold the prompts that are to come."""
    against, unknown, otherwise = [], [], []
    for target in dict.fromkeys(cell.target for cell in cells):
        own = [cell for cell in cells if cell.target == target]
        states = [cell.prefix_cache["state"] for cell in own]
        kept = [c.index for c in own if c.prefix_cache["state"] == "on" and c.prefix_cache["hits"] != 0]
        silent = [c.index for c in own if c.prefix_cache["state"] == "unknown"]
        against += [_finding("cache_kept", target=target, cells=kept)] if kept else []
        unknown += [_finding("cache_unknown", target=target, cells=silent)] if silent else []
        otherwise += [_finding("cache_on", target=target)] if "on" in states else []
        otherwise += [_finding("cache_reset", target=target, share=_found_share(own))] if "reset" in states else []
    none = [_finding("cache_off") if cells else _finding("no_cells")]
    return _gate("no-borrowed-cache", against=against, unknown=unknown, otherwise=otherwise or none)


def _found_share(cells: Sequence[CellResult]) -> float:
    """Of the prompt tokens that a server looked for in its prefix cache, the share that it found, as far as it says."""
    queries, hits = (sum(cell.prefix_cache[name] or 0 for cell in cells) for name in ("queries", "hits"))
    return hits / queries if queries else 0.0


def _same_work(plan: JSON, whole: Sequence[CellResult]) -> JSON:
    different, compared = [], 0
    baseline, *others = targets(plan)
    for level in plan["levels"]:
        own = [cell for cell in whole if cell.level == level]
        for first, second in (pair for other in others for pair in pairs(own, baseline, other)):
            compared += min(len(first.requests), len(second.requests))
            values = {"target": second.target, "level": level, "repeat": first.repeat}
            unequal = stats.different_work(first.requests, second.requests, one_goes_on=goes_on(plan))
            different += [_finding("other_work", **values, request=index) for index in unequal]
    if not others:
        return _gate("same-work", otherwise=[_finding("one_server")])
    against = different if compared else [_finding("no_pairs")]
    return _gate("same-work", against=against, otherwise=[_finding("equal_work", pairs=compared)])


def _loaded_together(whole: Sequence[CellResult], measured: Mapping[int, Steady]) -> JSON:
    """What servers that differ much in speed share of their time is short, and may hold no request of one of them."""
    against = [
        _finding("not_together", target=cell.target, level=cell.level, repeat=cell.repeat)
        for cell in whole
        if cell.index not in measured or measured[cell.index].output_throughput is None
    ]
    shares = [_share_together(cell) for cell in whole]
    shared = [_finding("together", share=min(shares))] if shares else [_finding("no_cells")]
    return _gate("together", against=against if shares else shared, otherwise=shared)


def _share_together(cell: CellResult) -> float:
    """How much of the time from a cell's first request to its last answer all servers were under load."""
    first, last = cell.requests.sent_ns.min(initial=cell.end_ns), cell.requests.end_ns.max(initial=cell.start_ns)
    start, end = cell.requests.shared_ns or (first, first)
    return float((end - start) / max(1, last - first))


def _nothing_drifted(plan: JSON, measured: Mapping[int, Steady], whole: Sequence[CellResult]) -> JSON:
    """In an open loop a queue that grows is a finding, which takes the verdicts on latency of its level alone.

    That nothing drifted is known when each target had a cell at its highest level that was long enough to tell, and no
    cell of an open loop was too short for the time that its requests waited.
    """
    told = [
        _finding("rose" if change > 0 else "fell", cell=index, metric=metric, change=abs(change))
        for index, moved in steady.drifts(measured).items()
        for metric, change in moved.items()
    ]
    if told and plan["arrival"] != "closed":
        told = [_finding("over_saturated"), *told]
    judged = sum(bool(cell.trends) for cell in measured.values())
    no_trend = [] if told else [_finding("no_trend", judged=judged, cells=len(measured))]
    waited = [_finding("waited", cell=index, share=share) for index, share in steady.short(measured).items()]
    highest = {cell.target: max(c.level for c in whole if c.target == cell.target) for cell in whole}
    at_it = [cell for cell in whole if cell.level == highest[cell.target] and cell.index in measured]
    known = {cell.target for cell in at_it if measured[cell.index].trends}
    too_short = [_finding("too_short", target=target) for target in highest if target not in known]
    if told and plan["arrival"] == "closed":
        return _gate("no-drift", against=told, otherwise=[])
    if not highest or waited or too_short:
        return _gate("no-drift", unknown=[*told, *waited, *too_short, *no_trend], otherwise=[])
    return _gate("no-drift", otherwise=told or no_trend)


def _client_came_to_its_end(cells: Sequence[CellResult]) -> JSON:
    stopped = [cell.index for cell in cells if cell.client and not cell.client["complete"]]
    against = _silent(cells) + ([_finding("stopped", cells=stopped)] if stopped else [])
    return _gate("client-complete", against=against, otherwise=[_finding("all_cells", count=len(cells))])


def _client_was_fast_enough(plan: JSON, cells: Sequence[CellResult]) -> JSON:
    """What the load generator says of itself; its limits are its own. A closed loop has no schedule to be late on."""
    judged = [(cell.index, cell.client) for cell in cells if cell.client]
    against = _silent(cells)
    against += [
        _finding("too_slow", cell=index, reasons=client["reasons"]) for index, client in judged if not client["valid"]
    ]
    short = [index for index, client in judged if client["valid"] and client["cpu_share"] is None]
    unknown = [_finding("too_short_for_cpu", cells=short)] if short else []
    behind = [] if all(client["goes_first"] for _, client in judged) else [_finding("not_first")]
    worst = list(_worst([client for _, client in judged])) or [_finding("nothing_against")]
    gate = _gate("client-fast", against=against, unknown=unknown, otherwise=worst)
    unscheduled = [_finding("no_schedule")] if judged and plan["arrival"] == "closed" else []
    return gate | {"found": gate["found"] + unscheduled + behind}


def _silent(cells: Sequence[CellResult]) -> list[JSON]:
    """What is missing to know how the load generator did."""
    silent = [cell.index for cell in cells if not cell.client]
    if not cells:
        return [_finding("no_cells")]
    return [_finding("no_self_check", cells=silent)] if silent else []


def _worst(clients: Sequence[JSON]) -> Iterator[JSON]:
    """The most of each figure that a load generator is judged by."""
    for name in ("cpu_share", "loop_lag_p99_seconds", "send_lateness_p99_seconds"):
        known = [client[name] for client in clients if client[name] is not None]
        if known:
            yield _finding(f"at_most_{name}", value=max(known))


def _finding(name: str, **values: Any) -> JSON:
    return {"id": name, **values}


def _gate(name: str, *, against: Sequence[JSON] = (), unknown: Sequence[JSON] = (), otherwise: Sequence[JSON]) -> JSON:
    """A rule, which fails when anything was found against it, and is not judged when something is unknown."""
    found = [*against, *unknown] or list(otherwise)
    more = [_finding("more", count=len(found) - LISTED)] if len(found) > LISTED else []
    return {"id": name, "passed": False if against else None if unknown else True, "found": found[:LISTED] + more}
