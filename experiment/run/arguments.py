"""Whether the servers would take the arguments that a plan gives them, asked before the first of them is started."""

import subprocess
import sys

from experiment.plan.plan import Plan, Target
from experiment.plan.settings import PlanError
from experiment.run.stack import command_of

SHAPES = "from servers.models import SHAPES; print(*SHAPES)"
# Where a kind of server has its settings, which load neither torch nor a model.
SETTINGS = {"hf": "servers.hf.settings", "vllm": "servers.vllm.launch"}
CHECK = """
import sys
from servers.settings import parse
from {module} import PROGRAM, Settings
parse(Settings, PROGRAM, sys.argv[1:])
"""


def require_arguments(plan: Plan) -> None:
    """Raise PlanError for a target whose server would refuse its arguments; those behind -- only vLLM can judge."""
    _require_shape(plan)
    for target in plan.targets:
        given = plan.hf_args if target.kind == "hf" else plan.vllm_args
        if not target.url and (target.args or given):
            _require(plan, target, given)


def _require_shape(plan: Plan) -> None:
    """Raise PlanError for random weights of a shape that no server knows."""
    kind, _, shape = plan.model.partition(":")
    if kind == "random" and any(not target.url for target in plan.targets):
        shapes = subprocess.run(
            [sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True
        ).stdout.split()
        if shape not in shapes:
            raise PlanError(f"model: {plan.model!r}: unknown shape; expected random: and one of {', '.join(shapes)}")


def _require(plan: Plan, target: Target, given: str) -> None:
    module, *arguments = command_of(plan, target, port=1)
    check = CHECK.format(module=SETTINGS[target.kind])
    done = subprocess.run([sys.executable, "-c", check, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.removeprefix(f"{module}: ") for line in done.stderr.splitlines() if line.startswith(f"{module}: ")]
        told = "; ".join(said) or done.stderr.strip().rpartition("\n")[2]
        values = " and ".join(repr(one) for one in (given, target.args) if one)
        raise PlanError(f"the arguments of target {target.name}: {values}: {told.removeprefix('error: ')}")
