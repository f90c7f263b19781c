"""A conversation on a terminal: messages and commands, line by line, and what Ctrl-C does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from runtime.errors import MixtralError, RequestError
from runtime.process.interrupts import restore_interrupts
from runtime.shell.command import put, reason, say
from runtime.shell.conversation import Conversation
from runtime.shell.ranks import Stopped
from runtime.shell.slash import Command, help_lines, parse

GREETING = "Write a message and press Enter; Ctrl-C ends an answer, Ctrl-D the conversation; /help says more"


class Reader(Protocol):
    """Where messages come from: see `runtime.shell.reading.MessageReader`."""

    def read(self) -> str | None: ...

    def remember(self, message: str) -> None: ...


def talk(conversation: Conversation, reader: Reader) -> None:
    """Take turns until end of file. A turn that fails prints why, and the next may succeed.

    Ctrl-C ends an answer, whose text so far stays in the conversation. At an empty prompt it says how to end
    the program. Raises `KeyboardInterrupt` if it comes there a second time, and `RequestError` if the
    conversation's file cannot be written at the end.
    """
    say(GREETING)
    recall(conversation, reader)
    hinted = False
    while True:
        try:
            text = reader.read()
            hinted = False
            if text is None:
                print(file=sys.stderr)
                break
            if text.strip() and not take(conversation, reader, text):
                break
            conversation.keep()
        except KeyboardInterrupt:
            if hinted or conversation.engine.distributed:  # it ends all ranks
                raise
            hinted = True
            say("Ctrl-C once more ends the program, and so does Ctrl-D")
        except Stopped:
            raise
        except (MixtralError, OSError) as error:
            conversation.engine.check_ranks()
            say(f"error: {reason(error)}")
    conversation.keep()


def take(conversation: Conversation, reader: Reader, text: str) -> bool:
    """Answer a message or do a command. Returns False if the command ends the conversation."""
    command = parse(text)
    if command is None:
        answer(conversation, lambda: conversation.answer(text))
        return True
    match command.name:
        case "/retry":
            answer(conversation, conversation.retry)
        case "/reset":
            conversation.reset()
            say("a new conversation begins")
        case "/save":
            path = file_of(command, conversation)
            conversation.save(path)
            say(f"saved to {path}")
        case "/load":
            conversation.load(file_of(command, conversation))
            recall(conversation, reader)
        case "/stats":
            say_stats(conversation)
        case "/help":
            for line in help_lines():
                say(line)
    return command.name != "/quit"


def answer(conversation: Conversation, work: Callable[[], None]) -> None:
    """Answer, at most until Ctrl-C."""
    last = conversation.last
    try:
        with restore_interrupts():
            work()
    except KeyboardInterrupt:
        if conversation.engine.distributed:
            raise
        put("\n")
        begun = conversation.last is not last
        say("the answer was ended" + ("" if begun else " before it began; the conversation is as it was"))


def file_of(command: Command, conversation: Conversation) -> Path:
    """The file that a command names, or the conversation's own. Raises `RequestError` if there is neither."""
    if command.argument:
        return Path(os.path.expanduser(command.argument))  # pathlib's raises for a user there is not
    if conversation.file.path is None:
        raise RequestError(f"{command.name} needs a file: {command.name} FILE")
    return conversation.file.path


def recall(conversation: Conversation, reader: Reader) -> None:
    """Say what is there of a conversation that goes on, and let the arrow keys find its messages."""
    if not conversation.turns:
        return
    say(f"the conversation goes on after {conversation.turns} turn{'s' * (conversation.turns > 1)}")
    for message in conversation.messages:
        if message["role"] == "user":
            reader.remember(message["content"])


def say_stats(conversation: Conversation) -> None:
    engine, turns = conversation.engine, conversation.turns
    held = len(conversation.session.ids) if turns else 0
    say(f"turns: {turns}; the context holds {held} of {engine.plan.context} tokens")
    for line in str(engine.stats()).splitlines():
        say(line)
