"""What a checkpoint answers to a few prompts, by which a case knows that a result is right."""

from collections.abc import Sequence
from pathlib import Path

from dev.harness.outcome import Wrong
from dev.harness.subject import RESIDENT
from runtime import Engine, EngineOptions, RequestError, SamplingParams

PROMPTS: tuple[tuple[int, ...], ...] = ((1, 300, 400, 500), (1, 9), (1, *range(700, 740)), (1, 1999, 3))
GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
Answer = list[int]


def answer(engine: Engine, prompt: Sequence[int] = PROMPTS[0], params: SamplingParams = GREEDY) -> Answer:
    return [token.id for token in engine.generate(list(prompt), params)]


def answers(folder: Path, options: EngineOptions = RESIDENT) -> list[Answer]:
    """The answers to all prompts, by a new engine."""
    with Engine.load(folder, options) as engine:
        return [answer(engine, prompt) for prompt in PROMPTS]


def check_answers(folder: Path, known: list[Answer], harmless: str) -> None:
    """Raises `Wrong` if a harmless change, named so, has given a checkpoint other answers."""
    if answers(folder) != known:
        raise Wrong(f"{folder.name}: {harmless} changed its answers")


def use(folder: Path) -> list[Answer | str]:
    """The same for a checkpoint whose damage, such as NaN, may show only in a request. A `RequestError` takes
    the place of its answer; other errors are raised."""
    found: list[Answer | str] = []
    with Engine.load(folder, RESIDENT) as engine:
        for prompt in PROMPTS:
            try:
                found.append(answer(engine, prompt))
            except RequestError as error:
                found.append(str(error))
    return found
