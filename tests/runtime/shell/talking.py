"""A conversation at which is typed what a test says."""

from pathlib import Path
from typing import Any

import pytest

from runtime import Engine, SamplingParams, Session
from runtime.shell.conversation import Conversation
from runtime.shell.talk import GREETING, talk

PARAMS = SamplingParams(max_new_tokens=12, seed=3, ignore_eos=True)


class Typed:
    """In place of a reader, something that is typed in advance. An exception is raised."""

    def __init__(self, *messages: str | BaseException) -> None:
        self.messages = iter(messages)
        self.remembered: list[str] = []

    def read(self) -> str | None:
        message = next(self.messages, None)
        if isinstance(message, BaseException):
            raise message
        return message

    def remember(self, message: str) -> None:
        self.remembered.append(message)


class Talk:
    """A conversation with what it printed: `out`, and the lines of `err` without the greeting."""

    def __init__(self, engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
        self.engine, self.capfd, self.typed = engine, capfd, Typed
        self.opened: list[Session] = []

    def __call__(
        self,
        *typed: Any,
        system: str | None = None,
        params: SamplingParams = PARAMS,
        path: Path | None = None,
    ) -> None:
        self.capfd.readouterr()
        conversation = Conversation(self.engine, params, system, path)
        self.reader = self.typed(*typed)
        try:
            talk(conversation, self.reader)
        finally:
            self.session = conversation.session
            self.opened.append(self.session)
            self.out, err = self.capfd.readouterr()
            self.err = [line for line in err.splitlines() if line != GREETING]
