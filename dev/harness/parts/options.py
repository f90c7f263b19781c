"""Options, parameters and prompts of every type and size, given to an engine and to requests."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch

from dev.harness.answers import PROMPTS, answer
from dev.harness.mutate.values import NUMBERS, weird, weird_text
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import OFFLOADED, RESIDENT, Subject
from runtime import Engine, EngineOptions, OptionError, RequestError, SamplingParams

WORDS = (
    "cpu", "cuda", "cuda:7", "cpu:1", "mps", "meta", "float16", "lru", "always", "90%", "1GiB", "-1",
    "1e99GiB",
)  # fmt: skip


@contextmanager
def open_options(subject: Subject) -> Iterator[Case]:
    with Engine.load(subject.hf, RESIDENT) as resident, Engine.load(subject.hf, OFFLOADED) as offloaded:
        known = answer(resident)

        def case(chance: Random) -> Verdict:
            if chance.random() < 0.3:
                return engine_case(subject, chance)
            engine = chance.choice((resident, offloaded))
            try:
                params = SamplingParams(**some_fields(SamplingParams, chance))
                for count, _ in enumerate(engine.generate(prompt(chance), params)):
                    if count >= 4:
                        break
                return Verdict.ACCEPTED
            except (OptionError, RequestError):
                if answer(engine) != known:
                    raise Wrong("after a refused request, the next one has another answer") from None
                raise

        yield case


def engine_case(subject: Subject, chance: Random) -> Verdict:
    options = EngineOptions(**{"device": "cpu"} | some_fields(EngineOptions, chance))
    with Engine.load(subject.hf, options) as engine:
        answer(engine, PROMPTS[1])
    return Verdict.ACCEPTED


def some_fields(kind: Any, chance: Random) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: value(chance) for name in chance.sample(names, chance.choice((1, 1, 2)))}


def value(chance: Random) -> Any:
    match chance.randrange(8):
        case 0:
            return chance.choice(WORDS)
        case 1:
            return {chance.choice(NUMBERS): chance.choice(NUMBERS), 5: weird(chance)}
        case 2:
            return [chance.choice((weird_text(chance, 5000), *NUMBERS)) for _ in range(3)]
        case 3:
            tensors = torch.tensor(3), torch.tensor([1.5])
            return chance.choice((*tensors, b"bytes", object(), set(), 2 + 1j, range(3)))
        case 4:
            return weird(chance)
        case _:
            return chance.choice(NUMBERS)


def prompt(chance: Random) -> Any:
    match chance.randrange(6):
        case 0:
            return weird_text(chance, 5000)
        case 1:
            return value(chance)
        case 2:
            return [*PROMPTS[0], chance.choice((*NUMBERS, 2047, 2048, None, "x", torch.tensor(3)))]
        case 3:
            return torch.tensor(PROMPTS[0])
        case _:
            return list(PROMPTS[0])
