"""Conversations, and what the library says to the same messages."""

from collections.abc import Callable, Iterator

import pytest

from runtime import Engine, SamplingParams
from tests.runtime.shell.talking import PARAMS, Talk


@pytest.fixture
def talk(engine: Engine, capfd: pytest.CaptureFixture[str]) -> Iterator[Talk]:
    made = Talk(engine, capfd)
    yield made
    for session in made.opened:
        session.close()


@pytest.fixture
def answers(engine: Engine) -> Iterator[Callable[..., list[str]]]:
    """What a session of the library answers to messages."""
    opened = []

    def answers(*messages: str, system: str | None = None, params: SamplingParams = PARAMS) -> list[str]:
        opened.append(engine.session(system))
        texts = []
        for message in messages:
            opened[-1].send(message)
            texts.append("".join(token.text for token in opened[-1].generate(params)))
        return texts

    yield answers
    for session in opened:
        session.close()
