"""Requests that are to be served, drawn at random, each with the texts that it asks for."""

import argparse
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from runtime import SamplingParams

# What prompts begin with. They share it in part, so one finds its beginning in another's KV cache.
BASES = tuple(inspect.getsource(module)[:2400] for module in (argparse, textwrap))
WORDS = ("def", "self", "return", " x", "\n    ", "import os", "é€", "(", "):\n", "class A", "0", "🙂")
STOPS: tuple[tuple[str, ...], ...] = ((), (), (), ("\n",), ("self", "):"), ("e",))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yz", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CONTEXT = 1024  # of the model
SHORT, MEDIUM, LONG = (0, 100), (100, 900), (1300, 2400)  # characters of a base
Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Want:
    """A text that a request asks for: what follows a prompt, or the answer to messages."""

    prompt: str | Messages
    params: SamplingParams


@dataclass(frozen=True)
class Asked:
    """A request, and the texts that it asks for, in their order."""

    path: str
    body: Mapping[str, Any]
    wants: tuple[Want, ...]

    @property
    def chat(self) -> bool:
        return self.path.endswith("chat/completions")


def draw(chance: Random, streams: float = 0.6) -> Asked:
    """Any request. `streams` is the share of streams."""
    body, params = draw_options(chance)
    if chance.random() < streams:
        body["stream"] = True
        if chance.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    n = chance.choice((1, 1, 1, 1, 1, 2, 3))
    if n > 1:
        body["n"] = n
    draw_one = draw_chat if chance.random() < 0.5 else draw_completion
    return draw_one(chance, body, params, n)


def draw_options(chance: Random) -> tuple[dict[str, Any], SamplingParams]:
    """Sampling options, as a request says them and as a program does."""
    same: dict[str, Any] = {"temperature": chance.choice((0.0, 0.0, 0.7, 1.0, 1.3)), "top_p": 1.0}
    same["seed"] = chance.randrange(1 << 40)
    if stop := chance.choice(STOPS):
        same["stop"] = stop
    for share, name, values in (
        (0.2, "top_p", (0.5, 0.9)),
        (0.2, "ignore_eos", (True,)),
        (0.2, "presence_penalty", (-1.0, 0.5, 2.0)),
        (0.2, "frequency_penalty", (-0.5, 1.5)),
        (0.1, "repetition_penalty", (1.2,)),
        (0.1, "top_k", (5,)),
        (0.1, "min_p", (0.1,)),
        (0.1, "logit_bias", ({13: 5.0, 300: -100.0}, {1999: 100.0})),
    ):
        if chance.random() < share:
            same[name] = chance.choice(values)
    body = dict(same)
    if "stop" in body:
        body["stop"] = list(stop) if len(stop) > 1 else stop[0]
    if "logit_bias" in body:
        body["logit_bias"] = {str(id): bias for id, bias in body["logit_bias"].items()}
    if chance.random() < 0.2:
        body["cache_prompt"] = False
    return body, SamplingParams(**same)


def draw_chat(chance: Random, body: dict[str, Any], params: SamplingParams, n: int) -> Asked:
    limit = chance.randint(1, 24)
    body[chance.choice(("max_tokens", "max_completion_tokens"))] = limit
    params = replace(params, max_new_tokens=limit)
    if chance.random() < 0.3:
        body["logprobs"], top = True, chance.choice((0, 0, 3))
        params = replace(params, top_logprobs=top)
        if top:
            body["top_logprobs"] = top
    if not params.ignore_eos and chance.random() < 0.15:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        params = replace(params, json_schema=SCHEMA)
    messages: list[dict[str, str]] = []
    if chance.random() < 0.5:
        messages.append({"role": "system", "content": chance.choice(("Be brief.", BASES[0][:300]))})
    for _ in range(chance.choice((0, 0, 1, 2))):
        messages.append({"role": "user", "content": chance.choice(WORDS) + "?"})
        messages.append({"role": "assistant", "content": chance.choice(WORDS)})
    messages.append({"role": "user", "content": draw_text(chance, 0.1)})
    sent: list[dict[str, Any]] = [dict(message) for message in messages]
    if chance.random() < 0.3:
        content = messages[-1]["content"]
        sent[-1]["content"] = [{"type": "text", "text": part} for part in (content, "Now.")]
        messages[-1]["content"] = f"{content}\n\nNow."  # as tokenizers join them
    return Asked("/v1/chat/completions", body | {"messages": sent}, each_seed(tuple(messages), params, n))


def draw_completion(chance: Random, body: dict[str, Any], params: SamplingParams, n: int) -> Asked:
    limit = chance.randint(1, 40) if chance.random() < 0.9 else chance.randint(40, 120)
    body["max_tokens"] = limit
    params = replace(params, max_new_tokens=limit)
    if chance.random() < 0.3:
        body["logprobs"] = top = chance.choice((0, 1, 5))
        params = replace(params, top_logprobs=top)
    if not params.ignore_eos and chance.random() < 0.1:
        body["json_schema"] = SCHEMA
        params = replace(params, json_schema=SCHEMA)
    prompts = [draw_text(chance, 0.2)]
    if n == 1 and chance.random() < 0.15:
        prompts.append(draw_text(chance, 0.2))
    body["prompt"] = prompts if len(prompts) > 1 or chance.random() < 0.2 else prompts[0]
    wants = [want for prompt in prompts for want in each_seed(prompt, params, n)]
    return Asked("/v1/completions", body, tuple(wants))


def each_seed(prompt: str | Messages, params: SamplingParams, n: int) -> tuple[Want, ...]:
    """With a seed, each of `n` texts has its own, which follow each other."""
    assert params.seed is not None
    return tuple(Want(prompt, replace(params, seed=params.seed + each)) for each in range(n))


def draw_text(chance: Random, long: float) -> str:
    """A prompt that begins as others do. `long` is the share of those of several chunks."""
    kind = LONG if chance.random() < long else chance.choice((SHORT, SHORT, MEDIUM))
    words = "".join(chance.choice(WORDS) for _ in range(chance.randint(0, 6)))
    return chance.choice(BASES)[: chance.randint(*kind)] + words or "x"


def draw_long(chance: Random, tokens: int) -> Asked:
    """A request whose prompt takes as long as one can, and which finds nothing of it in a KV cache."""
    prompt = chance.choice(WORDS) + chance.choice(BASES)[: LONG[1]]
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0, "cache_prompt": False}
    return Asked("/v1/completions", body, (Want(prompt, greedy(tokens)),))


def draw_short(chance: Random) -> Asked:
    prompt = "".join(chance.choice(WORDS) for _ in range(4))
    body = {"prompt": prompt, "max_tokens": 4, "stream": True, "temperature": 0, "logprobs": 0}
    return Asked("/v1/completions", body, (Want(prompt, greedy(4)),))


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, temperature=0)
