"""Progress of work that takes more than a second, on stderr: a bar on a terminal, and two lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from runtime.shell.command import say
from runtime.units import format_bytes

PATIENCE = 1.0  # seconds of work before anything is shown


@contextmanager
def progress(
    total: int, what: str, unit: str, done: int = 0, form: Callable[[int], str] = "{:,}".format
) -> Iterator[Callable[[int], None]]:
    """Show how far work has come. Yields the function to call with each increment, in one thread at a time.

    `what` names the work, and `unit` what is counted. `form` writes a count where there is no bar. `done` of
    the `total` is done before the work begins.
    """
    report = bar if sys.stderr.isatty() else two_lines
    with report(total, what, unit, done, form) as advance:
        yield advance


@contextmanager
def bar(
    total: int, what: str, unit: str, done: int, form: Callable[[int], str]
) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and remaining time. It disappears when the work is done."""
    from tqdm import tqdm  # here, since it takes as long as all the flags

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
    """Print a line when the work has taken a second and one at its end, for a log."""
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
    """Show progress in bytes."""
    return progress(total, what, "", done, format_bytes)


def byte_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show the progress of loading. `Engine.load` takes this as its `progress`."""
    return byte_progress(total, "loading")


def kernel_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show the progress of compiling kernels. The first time on a machine takes seconds."""
    return progress(total, "compiling kernels", " stages")
