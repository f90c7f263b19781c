"""Commands inside a conversation: `/reset` and others.

A line is a command if its first word is a slash and letters. So `/etc/hosts` begins a message, and a space
before the slash makes a message of anything.
"""

import re
from typing import NamedTuple

from runtime.errors import RequestError

COMMANDS = {
    "/reset": "begin a new conversation; a system message stays",
    "/retry": "answer the last message again",
    "/stats": "show how full the context is, and how fast tokens come",
    "/help": "show this",
    "/quit": "end the program, as Ctrl-D does",
}
KEYS = (
    "Enter sends the message. A backslash before Enter begins another line of it, and a pasted text is one "
    "message.",
    "The arrow keys edit the line and find earlier messages. Ctrl-C ends an answer, or drops what is typed.",
    "A message may begin with a slash after a space: ' /reset'.",
)


class Command(NamedTuple):
    """A command, and what follows it."""

    name: str
    argument: str


def is_command(text: str) -> bool:
    """Whether `text` is meant as a command, known or not.

    >>> is_command("/reset"), is_command("/etc/hosts"), is_command(" /reset"), is_command("/a\\nb")
    (True, False, False, False)
    """
    return re.fullmatch(r"/[a-zA-Z]+(?:[ \t].*)?", text) is not None


def parse(text: str) -> Command | None:
    """The command that `text` is, or None if it is a message.

    Raises `RequestError` if there is no such command, or if it takes no argument and got one.

    >>> parse("/reset "), parse("Hello")
    (Command(name='/reset', argument=''), None)
    """
    if not is_command(text):
        return None
    name, _, argument = text.partition(" ")
    name, argument = name.strip(), argument.strip()
    if name not in COMMANDS:
        raise RequestError(
            f"{name} is no command; {', '.join(COMMANDS)} are. A space before the slash makes it a message"
        )
    if argument:
        raise RequestError(f"{name} takes nothing after it, and got {argument!r}")
    return Command(name, argument)


def help_lines() -> list[str]:
    """What `/help` prints."""
    width = max(map(len, COMMANDS)) + 2
    return [f"{name:<{width}}{meaning}" for name, meaning in COMMANDS.items()] + list(KEYS)
