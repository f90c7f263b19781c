"""What the user types in a conversation, one message at a time.

On a terminal, Python's `readline` edits the line and knows the earlier messages. Where it is missing, or
stdout goes elsewhere, the terminal's own editing has to do. A message has several lines if they are pasted,
or if a line ends in a backslash.
"""

import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

from runtime.shell.prompts import decode
from runtime.shell.slash import is_command

PROMPT, CONTINUED = "> ", "... "
PASTE = 0.05  # seconds within which the next line of a text arrives that a terminal pastes without brackets


class MessageReader:
    """Reads messages from stdin. Make one for a conversation, since its editor is the process's only one."""

    def __init__(self) -> None:
        self.editor = line_editor()
        self.last = ""
        self.typed = False  # whether Ctrl-C came after some text in the line

    def read(self) -> str | None:
        """Ask for a message. Returns None at end of file, and an empty one if Ctrl-C dropped what was typed.

        Raises `KeyboardInterrupt` if nothing had been typed, and `RequestError` if the message is not UTF-8.
        """
        parts: list[bytes] = []
        prompt = PROMPT
        try:
            while (lines := self.read_lines(prompt)) is not None:
                parts.append(lines)
                if not goes_on(lines):
                    break
                parts[-1], prompt = lines[:-1], CONTINUED
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if parts or self.typed:
                return ""
            raise
        if not parts:
            return None
        message = decode(b"\n".join(parts), "the message")
        self.remember(message)
        return message

    def read_lines(self, prompt: str) -> bytes | None:
        """A line, with those that arrive together with it as pasted ones do. A command is always one line."""
        self.typed = False
        line = self.read_line(prompt)
        if line is None or is_command(line.decode(errors="replace")):
            return line
        lines = [line]
        while select.select([sys.stdin], [], [], PASTE)[0] and (line := self.read_line("")) is not None:
            lines.append(line)
        return b"\n".join(lines)

    def read_line(self, prompt: str) -> bytes | None:
        """One line without its end, or a text pasted into it. Returns None at end of file."""
        if self.editor is None:
            print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.buffer.readline()
            return line.removesuffix(b"\n") if line else None
        try:
            with before_interrupt(self.note_typed):
                return input(prompt).encode(errors="surrogateescape")
        except UnicodeDecodeError as error:
            return error.object
        except EOFError:
            return None

    def note_typed(self) -> None:
        """Look at the line while it is there. The editor forgets it before `input` raises."""
        self.typed = bool(self.editor and self.editor.get_line_buffer())

    def remember(self, message: str) -> None:
        """Let the arrow keys find a message."""
        if self.editor is not None and message.strip() and message != self.last:
            self.editor.add_history(message)
            self.last = message


def goes_on(lines: bytes) -> bool:
    r"""Whether another line belongs to the message: its end is a backslash that no other one precedes.

    >>> goes_on(b"one\\"), goes_on(b"LaTeX \\\\"), goes_on(b"one")
    (True, False, False)
    """
    return (len(lines) - len(lines.rstrip(b"\\"))) % 2 == 1


def line_editor() -> ModuleType | None:
    """Python's `readline`, set up for messages; None where it is missing or could show nothing."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        import readline
    except ImportError:
        return None
    readline.set_auto_history(False)  # a message of several lines is one entry
    if "libedit" not in (readline.__doc__ or ""):  # which would take this for a command of its own
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


@contextmanager
def before_interrupt(note: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C calls `note` before it does what it did before."""
    handler: Any = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # Ctrl-C is ignored
        yield
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        note()
        handler(number, frame)

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
