"""A conversation on a terminal, turn by turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.errors import MixtralError, RequestError
from runtime.options import SamplingParams
from runtime.process.interrupts import restore_interrupts
from runtime.requests import check_room, more_context
from runtime.shell.command import put, reason, say
from runtime.shell.reading import MessageReader
from runtime.shell.slash import help_lines, parse
from runtime.shell.trimming import Messages, first_turn, turns_to_drop
from tokenizer import TokenizerError

if TYPE_CHECKING:
    from runtime.answer import Token
    from runtime.engine import Engine
    from runtime.session import Session


class Conversation:
    """A session with the commands of `runtime.shell.slash`. What it says about itself goes to stderr."""

    def __init__(self, engine: Engine, session: Session, params: SamplingParams) -> None:
        self.engine, self.session, self.params = engine, session, params

    def talk(self, reader: MessageReader) -> None:
        """Take turns until end of file. A turn that fails prints why, and the next may succeed.

        Ctrl-C ends an answer, whose text so far stays in the conversation. At an empty prompt it says how to
        end the program. Raises `KeyboardInterrupt` if it comes there a second time.
        """
        say(
            "Write a message and press Enter; Ctrl-C ends an answer, Ctrl-D the conversation; /help says more"
        )
        hinted = False
        while True:
            try:
                message = reader.read()
                hinted = False
                if message is None:
                    print(file=sys.stderr)
                    return
                if message.strip() and not self.take(message):
                    return
            except KeyboardInterrupt:
                if hinted:
                    raise
                hinted = True
                say("Ctrl-C once more ends the program, and so does Ctrl-D")
            except (MixtralError, OSError) as error:
                say(f"error: {reason(error)}")

    def take(self, text: str) -> bool:
        """Answer a message or do a command. Returns False if the command ends the conversation."""
        command = parse(text)
        if command is None:
            self.answer_or_stop(text)
        elif command.name == "/reset":
            self.reset()
        elif command.name == "/retry":
            self.answer_or_stop(None)
        elif command.name == "/stats":
            self.say_stats()
        elif command.name == "/help":
            for line in help_lines():
                say(line)
        return command is None or command.name != "/quit"

    def answer_or_stop(self, message: str | None) -> None:
        """Answer, at most until Ctrl-C."""
        before = self.last_message()
        try:
            with restore_interrupts():
                self.answer(message)
        except KeyboardInterrupt:
            put("\n")
            nothing = " before it began; the conversation is as it was"
            say("the answer was ended" + nothing * (self.last_message() is before))

    def answer(self, message: str | None) -> None:
        """Show the answer to `message`, or another one to the last message if it is None.

        If the answer does not begin, the conversation is what it was. Raises `RequestError` if it cannot be
        served.
        """
        session = self.session
        before = list(session.messages)
        if message is None:
            message = self.last_question()
            del session.messages[-2:]
        session.send(message)
        answer: dict[str, str] = {}
        try:
            self.make_room()
            tokens = session.generate(self.params)
            answer = session.messages[-1]  # the session adds to it what the caller takes
            show(tokens, self.engine)
        except BaseException:
            if not answer.get("content"):
                session.messages[:] = before
            raise

    def last_message(self) -> dict[str, str] | None:
        return self.session.messages[-1] if self.session.messages else None

    def last_question(self) -> str:
        messages = self.session.messages
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise RequestError("there is no answer yet that could be given again; write a message")
        return messages[-2]["content"]

    def make_room(self) -> None:
        """Forget the oldest turns if the context is full. Raises `RequestError` if the last message alone is
        too long, and forgets nothing then."""
        messages, context, most = self.session.messages, self.engine.plan.context, self.engine.config.context
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
        del self.session.messages[first_turn(self.session.messages) :]
        say("a new conversation begins")

    def say_stats(self) -> None:
        turns = sum(message["role"] == "user" for message in self.session.messages)
        held = len(self.session.ids) if turns else 0
        say(f"turns: {turns}; the context holds {held} of {self.engine.plan.context} tokens")
        for line in str(self.engine.stats()).splitlines():
            say(line)


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
