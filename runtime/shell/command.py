"""What all commands share: streams that fail, interrupts, errors as one line, and exit statuses.

A command's file begins with

    from runtime.shell.command import launch, put, run

    if __name__ == "__main__":
        launch("tools.example")

so that this module already handles interrupts and errors while the slow imports after it run. So this file
imports little itself.

Only results go to stdout, by `put`. A command ends quietly with `DONE` if the reader of its stdout goes away.
Any other failure of stdout is an error. A command goes on if stderr takes no more, and its exit status still
tells how it went.
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
from runtime.shell.bus_errors import one_line_bus_errors

TYPE_CHECKING = False  # importing `typing` for this takes milliseconds
if TYPE_CHECKING:
    from typing import Any, NoReturn, TextIO

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class StdoutError(Exception):
    """Stdout takes no more. The exception's cause is the system's error."""


def launch(module: str) -> "NoReturn":
    """Import the command `module`, call its `main`, and exit the process with the status that it returns."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise the caller ignores Ctrl-C
        signal.signal(signal.SIGINT, interrupt)

    distributed = "--distributed" in sys.argv
    if distributed:  # PyTorch warns of addresses without names, and with stacks of what an error's line says
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def work() -> int:
        with one_line_bus_errors(FAILED):
            status: int = import_module(module).main()
        return status

    status = run(work)
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))  # no work is left to interrupt
    if distributed:  # Python would wait for connections to ranks that may hang
        os._exit(status)
    sys.exit(status)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C in a command. During an import this ends the process at once.

    An exception could be raised in a callback of the import system, where Python would print it and go on.
    """
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with suppress(OSError):
                os.write(2, b"interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def run(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do a command's work and return its exit status, which is what `work` returns, or `DONE` for None.

    An error of the runtime, the model, the tokenizer or the system becomes one line on stderr. Other
    exceptions are mistakes in the program, and propagate. `interrupted` is what to print after Ctrl-C.
    """
    with standard_streams():
        try:
            with one_line_warnings(), restore_interrupts():
                status = work()
            return DONE if status is None else status
        except SystemExit:  # argparse has printed the reason
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
    from tokenizer import TokenizerError  # here, since it imports sentencepiece

    return TokenizerError


def reason(error: BaseException | None) -> str:
    """Return what went wrong, with the file's name if the system gave one."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror


def put(text: str) -> None:
    """Write to stdout, at once and as UTF-8. On a terminal, control characters come out escaped.

    Raises `StdoutError` if stdout takes no more.
    """
    try:
        if sys.stdout.isatty():
            text = text.translate(ESCAPES)
        if hasattr(sys.stdout, "buffer"):
            data = memoryview(text.encode(errors="backslashreplace"))
            while data:
                data = data[sys.stdout.buffer.write(data) :]
        else:  # a program has redirected stdout to memory
            sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise StdoutError from error


def say(text: str) -> None:
    """Write `text` to stderr as one line."""
    print(one_line(text), file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Return `text` with every character escaped that is not printable.

    >>> print(one_line("two\\nlines \\x1b[2J é"))
    two\\nlines \\x1b[2J é
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Characters that are commands to a terminal, except newlines and tabs.
ESCAPES = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}


class PatientStderr:
    """A stderr whose writes never fail and give a terminal no commands. It writes nothing after a failure."""

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
    """Inside, all three streams can be used, even one that was closed when the process began."""
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
    """Flush a stream. If it takes no more, point it to the null device, where its flush at exit succeeds."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):  # the stream may have no file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Inside, warnings are shown as `warning: ...`, without the line of code that they come from."""

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
