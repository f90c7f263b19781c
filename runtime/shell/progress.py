"""Progress of work that takes more than a second, on stderr: a bar on a terminal, and lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from runtime.shell.command import say
from runtime.units import format_bytes

PATIENCE = 1.0  # seconds of work before anything is shown
MINUTE = 60.0  # seconds between two lines of a log


@contextmanager
def progress(
    total: int, what: str, unit: str, done: int = 0, form: Callable[[int], str] = "{:,}".format
) -> Iterator[Callable[[int], None]]:
    """Show how far work has come. Yields the function to call with each increment, in one thread at a time.

    `what` names the work, and `unit` what is counted. `form` writes a count where there is no bar. `done` of
    the `total` is done before the work begins.
    """
    report = bar if sys.stderr.isatty() else lines
    with report(total, what, unit, done, form) as advance:
        yield advance


@contextmanager
def bar(
    total: int, what: str, unit: str, done: int, form: Callable[[int], str]
) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and remaining time. It disappears when the work is done. A bar in another takes
    its place, since a command's stderr passes on no commands to move the cursor."""
    from tqdm import tqdm  # here, since it takes as long as all the flags

    look = {"unit_scale": True, "delay": PATIENCE, "leave": False, "position": 0}
    with tqdm(total=total, initial=done, desc=what, unit=unit, **look) as shown:

        def advance(count: int) -> None:
            shown.update(count)

        yield advance


@contextmanager
def lines(
    total: int, what: str, unit: str, done: int, form: Callable[[int], str]
) -> Iterator[Callable[[int], None]]:
    """Print lines for a log: after a second, after each further minute with the time left, and at the end."""
    began = time.monotonic()
    first, due = done, began + PATIENCE
    said = False

    def advance(count: int) -> None:
        nonlocal done, due, said
        done += count
        now = time.monotonic()
        if now < due:
            return
        rest = (now - began) * (total - done) / max(done - first, 1)
        left = f", {duration(rest)} left" if said else ""
        say(f"{what}: {form(done)} of {form(total)}{unit}{left}")
        said, due = True, now + MINUTE

    yield advance
    if said:
        say(f"{what}: done, {form(total)}{unit} in {duration(time.monotonic() - began)}")


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(2.34), duration(59.96), duration(61), duration(3600 * 2 + 60 * 5)
    ('2.3 s', '60.0 s', '1 min', '2 h 5 min')
    """
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def byte_progress(total: int, what: str, done: int = 0) -> AbstractContextManager[Callable[[int], None]]:
    """Show progress in bytes."""
    return progress(total, what, "", done, format_bytes)


def byte_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show the progress of loading. `Engine.load` takes this as its `progress`."""
    return byte_progress(total, "loading")


def download_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show the progress of a download."""
    return byte_progress(total, "downloading")


def kernel_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show the progress of compiling kernels. The first time on a machine takes seconds."""
    return progress(total, "compiling kernels", " stages")
