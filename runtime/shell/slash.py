"""Commands inside a conversation: `/reset` and others.

A line is a command if its first word is a slash and letters. So `/etc/hosts` begins a message, and a space
before the slash makes a message of anything.
"""

import re
from typing import NamedTuple

from model.errors import quoted
from runtime.errors import RequestError

COMMANDS = {  # with what may follow it, and what it does
    "/reset": ("", "begin a new conversation; a system message stays"),
    "/retry": ("", "answer the last message again"),
    "/save": ("FILE", "write the conversation to a file; without FILE, to that of --session"),
    "/load": ("FILE", "go on with the conversation of a file; without FILE, with that of --session"),
    "/stats": ("", "show how full the context is, and how fast tokens come"),
    "/help": ("", "show this"),
    "/quit": ("", "end the program, as Ctrl-D does"),
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

    >>> parse("/save my talk "), parse("Hello")
    (Command(name='/save', argument='my talk'), None)
    """
    if not is_command(text):
        return None
    name, *rest = text.split(maxsplit=1)
    argument = "".join(rest).strip()
    if name not in COMMANDS:
        raise RequestError(
            f"{name} is no command; {', '.join(COMMANDS)} are. A space before the slash makes it a message"
        )
    if argument and not COMMANDS[name][0]:
        raise RequestError(f"{name} takes nothing after it, and got {quoted(argument)}")
    return Command(name, argument)


def help_lines() -> list[str]:
    """What `/help` prints."""
    forms = [(f"{name} {argument}", meaning) for name, (argument, meaning) in COMMANDS.items()]
    width = max(len(form) for form, _ in forms) + 2
    return [f"{form:<{width}}{meaning}" for form, meaning in forms] + list(KEYS)
