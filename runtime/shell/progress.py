"""Progress on stderr of work that takes more than a second: a bar on a terminal, elsewhere two lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from runtime.shell.command import say
from runtime.units import format_bytes

PATIENCE = 1.0  # seconds of work before there is a word of it


@contextmanager
def progress(
    total: int, what: str, unit: str, done: int = 0, form: Callable[[int], str] = "{:,}".format
) -> Iterator[Callable[[int], None]]:
    """Show how far work has come. Gives the function to call with each increment, in one thread at a time.

    `what` names the work, `unit` what is counted, `form` writes a count down where there is no bar; `done` of
    the total was done before.
    """
    report = bar if sys.stderr.isatty() else two_lines
    with report(total, what, unit, done, form) as advance:
        yield advance


@contextmanager
def bar(
    total: int, what: str, unit: str, done: int, form: Callable[[int], str]
) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left, which goes when the work is done."""
    from tqdm import tqdm  # here, because it takes as long as all flags

    with tqdm(
        total=total, initial=done, desc=what, unit=unit, unit_scale=True, delay=PATIENCE, leave=False
    ) as shown:

        def advance(count: int) -> None:
            shown.update(count)

        yield advance


@contextmanager
def two_lines(
    total: int, what: str, unit: str, done: int, form: Callable[[int], str]
) -> Iterator[Callable[[int], None]]:
    """A line when the work has taken a second, and one at its end: for a log."""
    began, said = time.monotonic(), False

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        if not said and time.monotonic() - began > PATIENCE:
            said = True
            say(f"{what}: {form(done)} of {form(total)}{unit}")

    yield advance
    if said:
        say(f"{what}: done, {form(total)}{unit} in {time.monotonic() - began:.1f} s")


def byte_progress(total: int, what: str, done: int = 0) -> AbstractContextManager[Callable[[int], None]]:
    """Progress in bytes."""
    return progress(total, what, "", done, format_bytes)


def byte_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress of loading: what `Engine.load` takes as its `progress`."""
    return byte_progress(total, "loading")


def kernel_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress of compiling a GPU's kernels, in steps; it takes seconds where they never were compiled."""
    return progress(total, "compiling kernels", " steps")
