"""The arguments of servers, as the servers themselves read them."""

from typing import Any

import pytest

from experiment.plan.settings import PlanError
from experiment.run.arguments import require_arguments
from tests.unit.experiment.folders import make_plan

HF = {"name": "a", "kind": "hf"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"targets": [HF, HF | {"name": "b", "args": "--max-batchh 3"}]}, r"target b: '--max-batchh 3': unrecognized"),
        ({"hf_args": "--max-batch 0"}, r"target hf: '--max-batch 0': --max-batch: '0': Input should be greater than"),
        ({"vllm_args": "--max-num-seqs x"}, r"target vllm: '--max-num-seqs x': --max-num-seqs: 'x': Input should be"),
    ],
)
def test_what_a_server_would_refuse_is_refused_with_the_name_of_its_target(options: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=f"the arguments of {told}"):
        require_arguments(make_plan(**options))


def test_what_servers_take_is_taken_and_what_is_for_others_is_not_asked_about() -> None:
    other = {"name": "c", "kind": "url", "url": "http://127.0.0.1:1"}
    own = {"name": "v", "kind": "vllm", "args": "--max-num-seqs 3 -- --no-such-option-of-vllm"}
    require_arguments(make_plan(targets=[HF, own, other], hf_args="--engine batch"))


def test_random_weights_of_a_shape_that_no_server_knows_are_refused_before_anything_is_started() -> None:
    with pytest.raises(
        PlanError, match=r"model: 'random:huge': unknown shape; expected random: and one of tiny, gpt2,"
    ):
        require_arguments(make_plan(model="random:huge"))
