"""`headroom classic`: four inputs one after another on Transformers and at once on vLLM, step by step.

One server is up at a time. vLLM gets the inputs one after another too, so that what batching brings can be told from
what else differs.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiment import doctor
from experiment.classic.client import NEW_TOKENS, Answer, ask_at_once
from experiment.classic.findings import Finding, Served, find, total_seconds
from experiment.classic.memory import Reading, read, rest
from experiment.classic.words import LANGUAGES, amount, say
from experiment.environment import describe
from experiment.options import Options
from experiment.plan.plan import Plan, Target
from experiment.run.compare import FAILED, INTERRUPTED, new_folder
from experiment.run.kv import Sampler
from experiment.run.model import token_of_vllm
from experiment.run.stack import RunError, Stack

INPUTS = (
    "Hello!",
    "How are you doing today? I hope everything is going well.",
    "Tell me a story about artificial intelligence and machine learning. " * 10,
    "Thanks!",
)
# The original's settings, where the plan, the environment or the command line does not say otherwise.
DEFAULTS = {"model": "random:gpt2", "max-model-len": "512", "gpu-memory-utilization": "0.8"}
NAMES = {"hf": "HF", "vllm": "vLLM"}
# Between inputs, as in the original; in it the servers' memory is sampled at least once.
REST_SECONDS = 1.2
# Fine enough to see the KV cache of a small model, which answers within 50 ms.
SAMPLE_NS = 20_000_000
WARMUP_TOKENS = 4

Stages = list[tuple[str, Reading]]


def classic(arguments: Sequence[str], plan_of: Callable[[Sequence[str]], Plan], console: Console) -> int:
    """Run the experiment and tell it; returns 0, 1 when something failed, or 130 after Ctrl-C.

    `plan_of` reads a plan from the arguments that are not its own. classic.json keeps all that was measured.
    """
    options = Options("classic", "The classic experiment, step by step; other options are those of compare.")
    options.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the words")
    given, others = options.parse_known_args(arguments)
    plan = plan_of([*_defaults(others), *others, "--resident=one"])
    targets = {kind: next((one for one in plan.targets if one.kind == kind), None) for kind in NAMES}
    hf, vllm = targets["hf"], targets["vllm"]
    if not hf or not vllm:
        options.error("targets: expected one of kind hf and one of kind vllm")
    show = Show(console, given.lang)
    show.line("title", style="bold")
    show.line("setting", model=plan.model, longest=plan.max_model_len, new_tokens=NEW_TOKENS)
    show.heading("environment")
    if doctor.doctor(plan, console):
        return FAILED
    folder = new_folder(plan)
    try:
        return _keep(plan, (hf, vllm), folder.with_name(f"{folder.name}-classic"), show)
    except OSError as error:
        print(f"headroom: {error.filename or folder}: {error.strerror or error}", file=sys.stderr, flush=True)
        return FAILED


def _defaults(arguments: Sequence[str]) -> list[str]:
    """The original's settings, but for those that are given."""
    named = {argument.split("=")[0] for argument in arguments}
    said = [
        name for name in DEFAULTS if f"--{name}" in named or f"HEADROOM_{name.upper().replace('-', '_')}" in os.environ
    ]
    return [f"--{name}={value}" for name, value in DEFAULTS.items() if name not in said]


def _keep(plan: Plan, targets: tuple[Target, Target], folder: Path, show: "Show") -> int:
    """Run it and keep what was measured, whatever ends it; raises OSError when nothing can be kept."""
    for name in ("logs", "kv"):
        (folder / name).mkdir(parents=True)
    kept: dict[str, Any] = {"state": "partial", "reason": "interrupted", "model": plan.model}
    kept |= {"plan": plan.model_dump(), "environment": describe(), "inputs": list(INPUTS)}
    stages: Stages = []
    code = FAILED
    try:
        with Stack(plan, folder / "logs", lambda text: show.console.print(text, markup=False)) as stack:
            hf, vllm = _measure(plan, targets, stack, stages, show)
        stages.append((show.text("stage_end"), read()))
        findings = list(find(hf, vllm, plan.max_model_len or 0))
        show.stages(stages)
        show.findings(findings)
        kept |= {"state": "complete", "reason": None, "hf": asdict(hf), "vllm": asdict(vllm)}
        kept["findings"] = [asdict(one) | {"text": show.text(one.key, **one.figures)} for one in findings]
        code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
        print("headroom: interrupted", file=sys.stderr, flush=True)
    except (RunError, OSError) as error:
        kept["reason"] = str(error)
        print(f"headroom: {error}", file=sys.stderr, flush=True)
    kept["stages"] = [{"stage": name, **asdict(reading)} for name, reading in stages]
    path = folder / "classic.json"
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show.console.print(show.text("files", path=path), markup=False)
    return code


def _measure(
    plan: Plan, targets: tuple[Target, Target], stack: Stack, stages: Stages, show: "Show"
) -> tuple[Served, Served]:
    show.heading("before")
    stages.append((show.text("stage_before"), read()))
    show.memory(stages[-1][1])
    stack.start()
    served = []
    for target in targets:
        show.heading(target.kind)
        show.line("loading", name=NAMES[target.kind])
        stack.focus(target.name)
        served.append(Session(plan, target, stack, stages, show).run())
    return served[0], served[1]


class Session:
    """One server from its start to its last answer; each stage of its memory goes to `stages`."""

    def __init__(self, plan: Plan, target: Target, stack: Stack, stages: Stages, show: "Show"):
        self._plan, self._target, self._stages, self._show = plan, target, stages, show
        self._name = NAMES[target.kind]
        self._url = stack.programs[target.name].url
        self._monitor = stack.programs["monitor"].url
        self._model = target.model or plan.model
        self._samples = stack.programs["monitor"].log.parents[1] / "kv" / f"{target.name}.arrow"

    def run(self) -> Served:
        """Ask it all; raises RunError, OSError."""
        vllm = self._target.kind == "vllm"
        token = token_of_vllm(self._plan, self._url, self._target.args) if vllm else None
        sampler = Sampler(self._target.kind, self._url, self._samples, token)
        try:
            sampler.pace(SAMPLE_NS)
            ask_at_once(self._url, self._model, INPUTS, WARMUP_TOKENS)
            loaded = self._read("stage_loaded", rest(REST_SECONDS))
            self._show.line("loaded", name=self._name)
            self._show.memory(loaded)
            self._show.line("warm")
            answers, readings = self._one_by_one()
            if not vllm:
                return Served(loaded, answers, readings, self._read("stage_after", rest(REST_SECONDS)))
            at_once, busiest = self._at_once()
            return Served(loaded, answers, readings, self._read("stage_after", rest(REST_SECONDS)), at_once, busiest)
        finally:
            sampler.stop()

    def _one_by_one(self) -> tuple[list[Answer], list[Reading]]:
        answers, readings = [], []
        for place, text in enumerate(INPUTS, 1):
            answers += ask_at_once(self._url, self._model, [text])
            _, end_ns = rest(REST_SECONDS)
            readings.append(self._read("stage_input", (answers[-1].sent_ns, end_ns), place=place))
        self._show.answers("one_by_one", answers, readings)
        return answers, readings

    def _at_once(self) -> tuple[list[Answer], Reading]:
        answers = ask_at_once(self._url, self._model, INPUTS)
        _, end_ns = rest(REST_SECONDS)
        busiest = self._read("stage_at_once", (min(one.sent_ns for one in answers), end_ns))
        self._show.answers("all_at_once", answers, [busiest])
        return answers, busiest

    def _read(self, stage: str, window: tuple[int, int], **figures: object) -> Reading:
        reading = read(self._monitor, self._target.name, self._samples, window)
        self._stages.append((self._show.text(stage, name=self._name, **figures), reading))
        return reading


class Show:
    """Tells the experiment on the screen in one language."""

    def __init__(self, console: Console, language: str):
        self.console = console
        self._language = language

    def text(self, key: str, **figures: Any) -> str:
        """A text with its figures."""
        return say(self._language, key, figures)

    def line(self, key: str, style: str = "", **figures: Any) -> None:
        """Print a text."""
        self.console.print(self.text(key, **figures), markup=False, style=style)

    def heading(self, key: str) -> None:
        """Begin a step."""
        self.console.print()
        self.line(key, style="bold cyan")

    def memory(self, reading: Reading) -> None:
        """Print what is known of the memory at this moment, with the time of day."""
        parts: dict[str, tuple[Any, ...]] = {
            "machine": (reading.machine,),
            "gpus": (reading.gpus,),
            "held": (reading.held,),
        }
        parts |= {"kv": (reading.allocated, reading.unit), "capacity": (reading.capacity, reading.unit)}
        known = [f"{self.text(name)} {amount(*value)}" for name, value in parts.items() if value[0] is not None]
        self.console.print(f"{time.strftime('%H:%M:%S')}  {'  '.join(known)}", markup=False)

    def answers(self, key: str, answers: Sequence[Answer], readings: Sequence[Reading]) -> None:
        """Print a row for each answer and the totals; with one reading for all it stands in the last row."""
        at_once = len(readings) < len(answers)
        columns = ("input", "characters", "tokens_in", "tokens_out", "characters_out", "ttft", "time", "kv")
        table = self._table(columns)
        for place, one in enumerate(answers):
            reading = readings[place] if not at_once else readings[0] if place == len(answers) - 1 else None
            cache = amount(reading.allocated, reading.unit) if reading else ""
            counts = (len(INPUTS[place]), one.prompt_tokens, one.output_tokens, one.characters)
            times = [f"{seconds:.3f} s" for seconds in (one.ttft_seconds, one.e2e_seconds)]
            table.add_row(str(place + 1), *(f"{count:,}" for count in counts), *times, cache)
        self.line(key)
        self.console.print(table)
        total = total_seconds(answers, at_once=at_once)
        rate = sum(one.output_tokens for one in answers) / total
        self.line("total", total=total, mean=total / len(answers), rate=rate)

    def stages(self, stages: Stages) -> None:
        """Print the memory of all stages under each other."""
        self.heading("stages")
        table = self._table(("stage", "machine", "gpus", "held", "kv", "capacity"))
        for name, one in stages:
            cache = (amount(one.allocated, one.unit), amount(one.capacity, one.unit))
            table.add_row(name, amount(one.machine), amount(one.gpus), amount(one.held), *cache)
        self.console.print(table)
        self.line("held_note")

    def findings(self, findings: Sequence[Finding]) -> None:
        """Print what was seen."""
        self.heading("seen")
        for one in findings:
            self.console.print(f"- {self.text(one.key, **one.figures)}", markup=False)

    def _table(self, columns: Sequence[str]) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0))
        for place, name in enumerate(columns):
            table.add_column(self.text(name), justify="right" if place else "left", no_wrap=True)
        return table
