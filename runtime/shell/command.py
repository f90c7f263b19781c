"""What all commands have in common: streams that fail, interrupts, errors as one line, and exit statuses.

A command's file begins with

    from runtime.shell.command import launch, put, run

    if __name__ == "__main__":
        launch("tools.example")

so that the imports after it, which take long, happen inside the protection. This file imports little.

Stdout is for results alone, and they go there by `put`. A reader of stdout that goes away ends a command
quietly, with `DONE`; a stdout that cannot be written for another reason is an error. A stderr that takes no
more is no reason to stop: the exit status still tells how it went.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType

from model.errors import ModelError
from runtime.errors import MixtralError, OptionError
from runtime.process import shortage
from runtime.process.interrupts import restore_interrupts

TYPE_CHECKING = False  # all that `typing` is needed for, and it takes milliseconds to import
if TYPE_CHECKING:
    from typing import Any, NoReturn, TextIO

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class StdoutError(Exception):
    """Stdout takes no more; the cause is the system's error."""


def launch(module: str) -> "NoReturn":
    """Import the command `module`, call its `main`, and exit the process with what that returns."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else Ctrl-C is to be ignored
        signal.signal(signal.SIGINT, interrupt)
    status = run(lambda: import_module(module).main())
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))  # nothing is left to interrupt
    sys.exit(status)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C in a command. During an import it ends the process at once: an exception there may come up in a
    callback of the import system, and Python would print it and go on."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with suppress(OSError):
                os.write(2, b"interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def run(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do a command's work. Returns the exit status: when all went well what `work` returns, if anything.

    Errors of the runtime, the model, the tokenizer and the system become one line on stderr; other exceptions
    are mistakes in the program, and pass. `interrupted` is what to say after Ctrl-C.
    """
    with standard_streams():
        try:
            with one_line_warnings(), restore_interrupts():
                status = work()
            return DONE if status is None else status
        except SystemExit:  # argparse has said all
            raise
        except KeyboardInterrupt:
            say(interrupted)
            return INTERRUPTED
        except StdoutError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                return DONE  # the reader has had enough
            say(f"error: stdout: {reason(error.__cause__)}")
        except OptionError as error:
            say(f"error: {error}")
            return USAGE
        except (MixtralError, ModelError, OSError) as error:
            say(f"error: {reason(error)}")
        except (MemoryError, RuntimeError) as error:
            if not shortage.ran_short(error):
                raise
            say(f"error: out of memory ({shortage.reason(error)}); free some")
        except tokenizer_error() as error:
            say(f"error: {error}")
        return FAILED


def tokenizer_error() -> type[Exception]:
    from tokenizer import TokenizerError  # here, because it brings sentencepiece

    return TokenizerError


def reason(error: BaseException | None) -> str:
    """What went wrong; with the file's name, where the system gave one."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror


def put(text: str) -> None:
    """Write to stdout, at once and as UTF-8. On a terminal control characters come out escaped.

    Raises `StdoutError`.
    """
    try:
        if sys.stdout.isatty():
            text = text.translate(ESCAPES)
        if hasattr(sys.stdout, "buffer"):
            data = memoryview(text.encode(errors="backslashreplace"))
            while data:
                data = data[sys.stdout.buffer.write(data) :]
        else:  # one that a program has redirected to memory
            sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise StdoutError from error


def say(text: str) -> None:
    """Write one line to stderr, whatever characters are in `text`."""
    print(one_line(text), file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text` with all that is not printable escaped.

    >>> print(one_line("two\\nlines \\x1b[2J é"))
    two\\nlines \\x1b[2J é
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# What tells a terminal to do something else than to show a character, but for newlines and tabs.
ESCAPES = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}


class PatientStderr:
    """Stderr whose writes never fail, and tell a terminal nothing. Its first failure is its last attempt."""

    def __init__(self, stream: "TextIO") -> None:
        self.stream = stream
        self.escapes = {n: shown for n, shown in ESCAPES.items() if chr(n) != "\r"}  # progress bars use it

    def write(self, text: str) -> int:
        try:
            self.stream.write(text.translate(self.escapes))
        except OSError:
            drop_unwritable(self.stream)
        return len(text)

    def flush(self) -> None:
        drop_unwritable(self.stream)

    def __getattr__(self, name: str) -> "Any":
        return getattr(self.stream, name)


@contextmanager
def standard_streams() -> Iterator[None]:
    """While inside, all three streams can be used: also one that was closed when the process began."""
    before = sys.stdin, sys.stdout, sys.stderr
    opened = []
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            opened.append(open(os.devnull, mode))  # noqa: SIM115
            setattr(sys, name, opened[-1])
    if not isinstance(sys.stderr, PatientStderr):
        sys.stderr = PatientStderr(sys.stderr)
    try:
        yield
    finally:
        drop_unwritable(sys.stdout)
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        for stream in opened:
            stream.close()


def drop_unwritable(stream: "TextIO") -> None:
    """Flush; if the stream takes no more, point it to where its last flush, at exit, does not fail again."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):  # a stream without a file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show warnings, ours and others', as `warning: ...`, without the line of code that they come from."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: "TextIO | None" = None,
        line: str | None = None,
    ) -> None:
        say(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
