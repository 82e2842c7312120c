"""What the rules of a comparison found, and how a search ended, in words: the summary has them as data."""

from experiment.analysis.results import JSON
from experiment.words import Words, name_of


def rule(words: Words, gate: JSON) -> str:
    """The rule that a gate holds a run against."""
    return words(f"gate.{gate['id']}")


def found(words: Words, gate: JSON, arrival: str) -> str:
    """What a gate found; `arrival` is that of the plan, by which levels have their unit."""
    return words("join.clauses").join(_finding(words, one, arrival) for one in _merged(gate["found"]))


def _merged(findings: list[JSON]) -> list[JSON]:
    """Findings that differ in nothing but the target as one, with a list of these."""
    merged: list[JSON] = []
    for one in findings:
        rest = {name: value for name, value in one.items() if name != "target"}
        same = [other for other in merged if "target" in one and rest | {"target": other.get("target")} == other]
        if same:
            same[0]["target"].append(one["target"])
        else:
            merged.append(rest | ({"target": [one["target"]]} if "target" in one else {}))
    return merged


def _finding(words: Words, finding: JSON, arrival: str) -> str:
    shown = dict(finding)
    if "target" in finding:
        shown["target"] = words("join.list").join(map(name_of, finding["target"]))
    if "level" in finding:
        shown["level"] = words.level(finding["level"], closed=arrival == "closed")
    if "metric" in finding:
        shown["metric"] = words.named("moved", finding["metric"])
    for name in ("cells", "reasons"):
        if isinstance(finding.get(name), list):
            shown[name] = words("join.list").join(map(str, finding[name]))
    return words(f"found.{shown.pop('id')}", **shown)


def adds(words: Words, what: str) -> str:
    """What a rung of the ladder adds."""
    return " + ".join(words.named("adds", one) for one in what.split(" + "))


def search_end(words: Words, found: JSON) -> str:
    """How a search for the saturation ended: between which rates, and how sure that is."""
    met, missed = found["rate"], found["missed"]
    if met is None or missed is None:
        key = "search.none_met" if missed else "search.none_missed" if met else "search.none_tried"
        return words(key, rate=met or missed or 0)
    told = [words("search.between", met=met, missed=missed)]
    if not found["exact"]:
        told.append(words("search.early", precision=found["precision"]))
    if found["above"]:
        told.append(words("search.above", rate=found["above"]))
    if found["unsure"]:
        rates = words("join.list").join(f"{rate:.3g}" for rate in found["unsure"])
        told.append(words("search.unsure", rates=rates, wanted=found["wanted"]))
    return words("join.clauses").join(told)
