"""The model that each server offers, asked for before a run has a start: the answer may take a while."""

import json
from collections.abc import Iterable
from contextlib import closing

import gevent

from loadtest.client.receiver import Receiver
from loadtest.options import Options
from loadtest.run import api_key, connect

ANSWER_SECONDS = 5.0


def first_models(options: Options, targets: Iterable[str]) -> dict[str, str]:
    """Name of the first model that each target offers; none is asked where the option `model` names one.

    Raises ValueError for a server that has not said it after ANSWER_SECONDS.
    """
    if options.model:
        return {}
    with closing(Receiver(options.stamps)) as receiver:
        asked = {target: gevent.spawn(_ask, options, target, receiver) for target in targets}
        try:
            gevent.joinall(list(asked.values()), timeout=ANSWER_SECONDS)
        finally:
            gevent.killall(list(asked.values()))
    answers = {target: one.get() for target, one in asked.items()}
    problems = [
        f"{target}_url: {getattr(options, f'{target}_url')!r}: GET /v1/models: {problem}"
        for target, (name, problem) in answers.items()
        if not name
    ]
    if problems:
        raise ValueError(f"{'; '.join(problems)}; expected the name of a model, or --model NAME")
    return {target: name for target, (name, _) in answers.items()}


def _ask(options: Options, target: str, receiver: Receiver) -> tuple[str, str]:
    """The name, or an empty one and why there is none."""
    connection = connect(options, target, receiver)
    exchange = connection.get("/v1/models")
    connection.close()
    if exchange.error == "cancelled":
        return "", f"no answer after {ANSWER_SECONDS:g} s"
    if exchange.error:
        return "", f"{exchange.error}: {exchange.error_detail}".replace(api_key(target) or "***", "***")
    if exchange.status != 200:
        return "", f"status {exchange.status}"
    try:
        return str(json.loads(exchange.answer.body)["data"][0]["id"]), "its name is empty"
    except (ValueError, KeyError, IndexError, TypeError):
        return "", "an answer without data[0].id"
