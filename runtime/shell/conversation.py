"""A conversation on a terminal, turn by turn."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.errors import PromptTooLong, RequestError
from runtime.options import SamplingParams
from runtime.requests import more_context
from runtime.shell.command import put, say
from runtime.shell.prompts import decode

if TYPE_CHECKING:
    from runtime.answer import Token
    from runtime.engine import Engine
    from runtime.session import Session

PASTE = 0.05  # seconds within which the next line of a pasted text arrives


def converse(engine: Engine, session: Session, params: SamplingParams) -> None:
    """Take turns until end of file. A turn that fails prints why, and the next may succeed.

    Ctrl-C ends an answer, whose text so far stays in the conversation. At the prompt it ends the program.
    """
    say("Write a message and press Enter; Ctrl-C ends an answer, Ctrl-D ends the conversation.")
    advised = False
    while (message := read_message()) is not None:
        if not message.strip():
            continue
        try:
            session.send(decode(message, "the message"))
            show(session.generate(params), engine)
        except KeyboardInterrupt:
            put("\n")
            say("the answer was ended; Ctrl-C once more ends the program")
        except PromptTooLong as error:
            say(f"error: {error}")
            if session.messages and not advised:
                advised = True
                remedy = more_context(", with a larger context: ", engine.plan.context, engine.config.context)
                say(f"the conversation fills the context; end it with Ctrl-D and begin another{remedy}")
        except RequestError as error:
            say(f"error: {error}")
    print(file=sys.stderr)


def read_message() -> bytes | None:
    """Read what the user types, up to Enter. Lines that arrive together, as pasted ones do, are one message.

    Returns None at end of file.
    """
    print("> ", end="", file=sys.stderr, flush=True)
    lines = [sys.stdin.buffer.readline()]
    while lines[-1] and select.select([sys.stdin], [], [], PASTE)[0]:
        lines.append(sys.stdin.buffer.readline())
    return b"".join(lines) or None


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
