"""The rules that make a comparison valid, each with what was found. Evidence that is missing fails a rule."""

from collections.abc import Iterator, Sequence

from experiment import stats
from experiment.plan import TARGETS
from experiment.results import JSON, CellResult, Results, pairs

# More than these are not listed one by one.
LISTED = 20


def judge(results: Results) -> Iterator[JSON]:
    """Hold a run against each rule: its name as `rule`, whether it `passed`, and what was `found`."""
    planned = [
        (level, repeat + 1, target)
        for level in results.plan["concurrency"]
        for repeat in range(results.plan["repeats"])
        for target in TARGETS
    ]
    whole = {(c.concurrency, c.repeat, c.target): c for c in results.cells if c.complete and _has_all_records(c)}
    missing = [
        f"{target} at concurrency {level}, repeat {repeat}"
        for level, repeat, target in planned
        if (level, repeat, target) not in whole
    ]
    found = f"missing or short: {'; '.join(missing)}" if missing else f"{len(whole)} of {len(planned)}"
    yield _gate("every planned cell was run, and each of its requests has a record", not missing, found)

    failed = stats.errors_by_kind([record for cell in results.cells for record in cell.records])
    kinds = ", ".join(f"{count} {kind}" for kind, count in failed.items()) or "none failed"
    yield _gate("every request was answered", not failed, kinds)
    yield _same_work(results, list(whole.values()))
    yield _client_came_to_its_end(results.cells)
    yield _client_was_fast_enough(results.cells)


def _has_all_records(cell: CellResult) -> bool:
    return len({record.index for record in cell.records}) == len(cell.records) == cell.planned_requests


def _same_work(results: Results, whole: Sequence[CellResult]) -> JSON:
    different, compared = [], 0
    for level in results.plan["concurrency"]:
        for first, second in pairs([cell for cell in whole if cell.concurrency == level]):
            compared += len(first.records)
            unequal = stats.different_work(first.records, second.records)
            different += [f"concurrency {level} repeat {first.repeat} request {index}" for index in unequal]
    found = f"{compared} pairs, equal prompt and output tokens" if not different else "; ".join(different[:LISTED])
    return _gate("both servers did the same work", compared > 0 and not different, found if compared else "no pairs")


def _client_came_to_its_end(cells: Sequence[CellResult]) -> JSON:
    stopped = [str(cell.index) for cell in cells if cell.client and not cell.client["complete"]]
    against = _silent(cells) + ([f"not in cell {', '.join(stopped)}"] if stopped else [])
    rule = "the load generator sent all requests and waited for every answer"
    return _gate(rule, not against, "; ".join(against) or f"in all {len(cells)} cells")


def _client_was_fast_enough(cells: Sequence[CellResult]) -> JSON:
    """What the load generator says of itself; its limits are its own."""
    judged = [(cell.index, cell.client) for cell in cells if cell.client]
    against = _silent(cells)
    against += [f"cell {index}: {', '.join(client['reasons'])}" for index, client in judged if not client["valid"]]
    found = against[:LISTED] or [_worst([client for _, client in judged])]
    if not all(client["goes_first"] for _, client in judged):
        found.append("Linux did not let it run before the servers: root and CAP_SYS_NICE may")
    return _gate("the load generator was fast enough, by its own check", not against, "; ".join(found))


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


def _gate(rule: str, passed: bool, found: str) -> JSON:
    return {"rule": rule, "passed": passed, "found": found}
