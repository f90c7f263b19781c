"""An interrupt can come anywhere in a step of a batch. The next step does the rest, and nothing twice."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from runtime import Engine, EngineOptions, SamplingParams
from runtime.answer import Answer
from runtime.engine import DEMO
from runtime.runner import ModelRunner
from tests.runtime.ranks.engines import over_ranks

PARAMS = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)
PROMPTS = [[1, *range(300, 300 + count)] for count in (1, 9, 30)]
CPU: dict[str, Any] = {"device": "cpu", "threads": 1, "context": 64}


class Interrupting:
    """Calls a function, but on its n-th call raises an interrupt afterwards."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.left = call, -1

    def __call__(self, *words: Any) -> Any:
        result = self.call(*words)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return result


def check(engine: Engine, interrupting: Interrupting) -> None:
    expected = [list(engine.generate(prompt, PARAMS)) for prompt in PROMPTS]
    for when in range(1, 9):
        with engine.batch() as batch:
            requests = [batch.add(engine.work(prompt, PARAMS, reuse=False)) for prompt in PROMPTS]
            got: dict[Any, list[Any]] = {request: [] for request in requests}
            interrupting.left, interrupts = when, 0
            while batch.busy:
                try:
                    for request, result in batch.step():
                        got[request].append(result)
                except KeyboardInterrupt:
                    interrupts += 1
            assert interrupts == 1
            assert list(got.values()) == expected, when


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> Interrupting:
    """Interrupts when logits have been computed."""
    interrupting = Interrupting(ModelRunner.usable)
    monkeypatch.setattr(ModelRunner, "usable", lambda *words: interrupting(*words))
    return interrupting


def test_after_a_forward(usable: Interrupting) -> None:
    with Engine.load(options=EngineOptions(**CPU, parallel=3)) as engine:
        check(engine, usable)


def test_after_a_forward_over_ranks(usable: Interrupting) -> None:
    over_ranks(DEMO, (4, 4), lambda engine: check(engine, usable), **CPU, parallel=3)


def test_before_a_text_has_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts before it have theirs."""
    take, interrupting = Answer.take, Interrupting(lambda: None)

    def taking(self: Answer, row: Any) -> Any:
        interrupting()
        return take(self, row)

    monkeypatch.setattr(Answer, "take", taking)
    with Engine.load(options=EngineOptions(**CPU, parallel=3)) as engine:
        check(engine, interrupting)


def test_between_any_two_lines() -> None:
    """Everything ends, and whatever does not lose a token in the very moment of its return is right."""
    left, files = 0, ("batching/batch.py", "batching/scheduler.py")

    def lines(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0 and event == "line":
            raise KeyboardInterrupt
        return lines

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return lines if frame.f_code.co_filename.endswith(files) else None

    with Engine.load(options=EngineOptions(**CPU, parallel=2)) as engine:
        expected = [list(engine.generate(prompt, PARAMS)) for prompt in PROMPTS]
        right, tried = 0, 0
        while left <= 0:  # until no interrupt comes any more
            left = 1 + 97 * tried
            tried += 1
            with engine.batch() as batch:
                requests = [batch.add(engine.work(prompt, PARAMS, reuse=False)) for prompt in PROMPTS]
                got: dict[Any, list[Any]] = {request: [] for request in requests}
                for _ in range(60):
                    before = sys.gettrace()
                    try:
                        sys.settrace(trace)
                        results = batch.step()
                    except KeyboardInterrupt:
                        results = []
                    finally:
                        sys.settrace(before)
                    for request, result in results:
                        got[request].append(result)
                    if not batch.busy:
                        break
                assert not batch.busy
                right += list(got.values()) == expected
    assert tried > 10 and right > 0.8 * tried
