"""A conversation in the shell: a session, the file that keeps it, and what a full context makes it forget."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import RequestError
from runtime.options import SamplingParams
from runtime.requests import check_room, more_context
from runtime.shell.command import put, say
from runtime.shell.session_file import SessionFile, check_replaceable, restored
from runtime.shell.trimming import Messages, first_turn, turns_to_drop
from tokenizer import TokenizerError

if TYPE_CHECKING:
    from runtime.answer import Token
    from runtime.engine import Engine


class Conversation:
    """Answers go to stdout, and what it says about itself to stderr.

    With a `path`, it goes on with the conversation in that file if there is one, and `keep` writes it there.
    A `system` message takes the place of the file's. Raises `RequestError` if the file holds no conversation
    of this model.
    """

    def __init__(
        self, engine: Engine, params: SamplingParams, system: str | None = None, path: Path | None = None
    ) -> None:
        self.engine, self.params = engine, params
        if path is not None and path.exists():
            self.session = restored(engine, path)
            self.file = SessionFile(path, self.session)
            if system is not None:
                messages = self.session.messages
                messages[: first_turn(messages)] = [{"role": "system", "content": system}] if system else []
        else:
            self.session = engine.session(system)
            self.file = SessionFile(path, self.session)

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.session.messages

    @property
    def last(self) -> dict[str, str] | None:
        """The last message."""
        return self.messages[-1] if self.messages else None

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def answer(self, message: str) -> None:
        """Show the answer to a message.

        If the answer does not begin, the conversation is what it was. Raises `RequestError` if it cannot be
        served.
        """
        self.answer_after(list(self.messages), message)

    def retry(self) -> None:
        """Show another answer to the last message, as `answer` does."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise RequestError("there is no answer yet that could be given again; write a message")
        self.answer_after(self.messages[:-2], self.messages[-2]["content"])

    def answer_after(self, earlier: Messages, message: str) -> None:
        before = list(self.messages)
        answer: dict[str, str] = {}
        try:
            self.messages[:] = earlier
            self.session.send(message)
            self.make_room()
            tokens = self.session.generate(self.params)
            answer = self.messages[-1]  # the session adds to it what the caller takes
            show(tokens, self.engine)
        except BaseException:
            if not answer.get("content"):
                self.messages[:] = before
            raise

    def make_room(self) -> None:
        """Forget the oldest turns if the context is full. Raises `RequestError` if the last message alone is
        too long, and forgets nothing then."""
        messages, context, most = self.messages, self.engine.plan.context, self.engine.config.context
        try:
            dropped, start = turns_to_drop(messages, self.tokens, context, self.params.max_new_tokens)
            if not dropped:
                return
            first = first_turn(messages)
            check_room(self.tokens(messages[:first] + messages[start:]), context, most)
        except TokenizerError as error:
            raise RequestError(str(error)) from error
        del messages[first:start]
        turns = "the oldest turn is" if dropped == 1 else f"the {dropped} oldest turns are"
        remedy = more_context("; to keep more, ", context, most)
        say(f"note: the context of {context} tokens is full, so {turns} forgotten{remedy}")

    def tokens(self, messages: Messages) -> int:
        return len(self.engine.tokenizer.encode_chat(messages))

    def reset(self) -> None:
        """Forget all turns."""
        del self.messages[first_turn(self.messages) :]

    def keep(self) -> None:
        """Write the conversation to its own file, if it has one and the conversation has changed."""
        self.file.keep(self.session)

    def save(self, path: Path) -> None:
        """Write the conversation to any file. Raises `RequestError` if that fails, or if what is there is no
        saved session."""
        check_replaceable(path)
        self.session.save(path)

    def load(self, path: Path) -> None:
        """Go on with the conversation in a file. Raises `RequestError` if it cannot be used. Then the present
        one goes on, but its keys and values have to be computed again."""
        if not path.exists():
            raise RequestError(f"{path}: no such file")
        messages = self.messages
        self.session.close()  # first, since the plan has room for one KV cache
        try:
            self.session = restored(self.engine, path)
        except BaseException:
            self.session = self.engine.session()
            self.messages[:] = messages
            raise


def show(tokens: Iterator[Token], engine: Engine) -> None:
    """Write tokens to stdout as they come."""
    finish = None
    for token in tokens:
        put(token.text)
        finish = token.finish
    if sys.stdout.isatty():
        put("\n")
    if finish == "context":
        say(
            f"warning: stopped early, the context of {engine.plan.context} tokens is full"
            + more_context("; ", engine.plan.context, engine.config.context)
        )
