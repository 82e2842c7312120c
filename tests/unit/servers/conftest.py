"""The model that the tests of the servers share, the real `random:tiny`, loaded once; and engines around it."""

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
import torch
import transformers

from servers import models
from servers.hf.continuous import ContinuousEngine
from servers.hf.engine import Limits, ModelEngine
from servers.hf.jobs import Job, Sampling
from servers.hf.kv import Held
from servers.hf.padded import PaddedEngine

MakeEngine = Callable[..., ModelEngine]
Start = Callable[..., Awaitable[ModelEngine]]
Greedy = Callable[[Sequence[int], int], list[int]]
FailForward = Callable[..., None]
Outcome = tuple[list[int], str | None]

NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
PATIENCE_SECONDS = 60


def job(prompt: int, count: int, first: int = 300, **fields: Any) -> Job:
    """A greedy request that runs to its length; `prompt` is the number of its tokens, `first` the first of them."""
    sampling = {"max_tokens": count, "temperature": 0.0, "ignore_eos": True, **fields}
    return Job(tuple(token % 2048 for token in range(first, first + prompt)), Sampling(**sampling))


async def whole(job: Job) -> Outcome:
    """All tokens of a job, and why they end."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        steps = [step async for step in job.steps()]
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    return [step.token_id for step in steps], steps[-1].finish_reason


async def tokens(job: Job, count: int = 1) -> list[int]:
    """The next tokens of a job."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [(await anext(job.steps())).token_id for _ in range(count)]


async def serve(engine: ModelEngine, jobs: Sequence[Job]) -> list[Outcome]:
    """Submit jobs at the same moment and collect their tokens."""
    for one in jobs:
        engine.submit(one)
    return await asyncio.gather(*(whole(one) for one in jobs))


async def outcomes(jobs: Sequence[Job]) -> list[BaseException | Outcome]:
    """How jobs end, some of them with an error."""
    return await asyncio.gather(*(whole(one) for one in jobs), return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the engine's thread does."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - set in a thread, without an event
            await asyncio.sleep(0.001)


def idle(engine: ModelEngine) -> bool:
    """Whether the engine holds nothing."""
    return (engine.running, engine.waiting, engine.held) == (0, 0, Held())


@pytest.fixture(scope="session")
def tiny() -> models.Model:
    # In the user's cache folder, so that only the first run ever has to write it.
    return models.resolve("random:tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny: models.Model) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny.source)


@pytest.fixture(scope="session")
def weights(tiny: models.Model) -> Any:
    # Its operations are too small to gain from more threads.
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.source, dtype=torch.float32).eval()
    # As the server does; Transformers collects garbage several times when a manager stops.
    gc.freeze()
    return model


@pytest.fixture(scope="session")
def greedy(weights: Any) -> Greedy:
    """What the model says to a prompt, one whole forward pass for each token: no cache, no batch, no engine."""
    known: dict[tuple[int, ...], list[int]] = {}

    @torch.no_grad()
    def greedy(prompt: Sequence[int], count: int) -> list[int]:
        said = known.setdefault(tuple(prompt), [])
        while len(said) < count:
            ids = torch.tensor([[*prompt, *said]])
            said.append(int(weights(ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax()))
        return said[:count]

    return greedy


@pytest.fixture(scope="session")
def make_engine(weights: Any) -> MakeEngine:
    """Builds an engine of a kind; named arguments are limits, but for those that are given here."""

    def make_engine(
        kind: str, model: Any = None, max_wait_seconds: float = 0.0, block_size: int = 16, **limits: Any
    ) -> ModelEngine:
        rows = {"sequential": 1}.get(kind, 4)
        given = Limits(**{"max_model_len": 96, "max_batch": rows, **limits})
        if kind == "continuous":
            return ContinuousEngine(model or weights, given, block_size)
        return PaddedEngine(
            model or weights, given, max_wait_seconds, static=kind == "static", compiled=kind == "compiled"
        )

    return make_engine


@pytest.fixture
async def start(make_engine: MakeEngine) -> AsyncIterator[Start]:
    """Starts engines as `make_engine` builds them, and closes them after the test."""
    async with AsyncExitStack() as stack:

        async def start(kind: str, **arguments: Any) -> ModelEngine:
            engine = make_engine(kind, **arguments)
            stack.push_async_callback(engine.close)
            async with asyncio.timeout(30):
                await engine.start()
            return engine

        yield start


@pytest.fixture
def fail_forward(weights: Any) -> Iterator[FailForward]:
    """Makes the model raise an error, once, after a number of passes that still work."""
    hooks = []

    def fail_forward(error: Exception, passes: int = 0) -> None:
        calls = itertools.count()

        def hook(*_: object) -> None:
            if next(calls) == passes:
                raise error

        hooks.append(weights.register_forward_pre_hook(hook))

    yield fail_forward
    for hook in hooks:
        hook.remove()
