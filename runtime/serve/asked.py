"""A request in the model's terms: prompts of ids, how tokens are sampled, and how they become text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.batching.batch import Work
from runtime.engine import Engine
from runtime.options import SamplingParams
from runtime.requests import check_bias, check_ids, check_room
from runtime.serve.errors import Refusal
from runtime.serve.schemas import MOST_CHOICES, Sampling
from tokenizer import StreamDecoder

SAME = (  # fields of requests that are fields of `SamplingParams`
    "temperature", "top_p", "seed", "stop", "logit_bias", "top_k", "min_p", "repetition_penalty",
    "ignore_eos", "presence_penalty", "frequency_penalty",
    "grammar", "json_schema",
)  # fmt: skip


SEEDS = 1 << 63  # after the last one comes the first


@dataclass(frozen=True)
class Prompt:
    """The ids to continue, and what turns the next ones into text."""

    ids: list[int]
    decoder: Callable[[], StreamDecoder]


def make_works(
    engine: Engine, prompts: Sequence[Prompt], request: Sampling, limit: int | None, **more: Any
) -> list[Work]:
    """`n` texts for each prompt, in this order, of at most `limit` tokens (None: what the context holds).
    `more` are fields of `SamplingParams` that depend on the kind of request.

    With a seed, the texts of one prompt have seeds of their own, which follow it. Raises `RequestError` if a
    prompt or an option does not fit the model.
    """
    n = request.n or 1
    if len(prompts) * n > MOST_CHOICES:
        asked = f"{len(prompts)} prompts times n {n}"
        raise Refusal(400, f"{asked} is more than {MOST_CHOICES} texts; ask for fewer", param="n")
    works = []
    for prompt in prompts:
        ids = check_ids(prompt.ids, engine.config.vocab)
        room = check_room(len(ids), engine.plan.context, engine.config.context)
        params = make_params(request, room if limit is None else limit, **more)
        check_bias(params.logit_bias, engine.config.vocab)
        for each in range(n):
            own = params if params.seed is None else replace(params, seed=(params.seed + each) % SEEDS)
            works.append(Work(ids, own, prompt.decoder(), request.cache_prompt is not False))
    return works


def make_params(request: Sampling, limit: int, **more: Any) -> SamplingParams:
    """The sampling options of a request. What it leaves open is as with OpenAI, and not as in the shell.

    Raises `OptionError` for a value that makes no sense.
    """
    given: dict[str, Any] = {"max_new_tokens": limit, "temperature": 1.0, "top_p": 1.0}
    for name in SAME:
        if (value := getattr(request, name)) is not None:
            given[name] = value
    if given.keys() & {"json_schema", "grammar"} and more.keys() & {"json_schema", "grammar"}:
        raise Refusal(400, "json_schema, grammar, response_format and tools bound the text; give one of them")
    return SamplingParams(**given, **more)


def check_stream_options(request: Sampling) -> None:
    """Raises `Refusal` if there are options for a stream that was not asked for."""
    if request.stream_options is not None and not request.stream:
        message = "stream_options are for streams; leave them out, or set stream to true"
        raise Refusal(400, message, param="stream_options")
