"""Ctrl-C that comes out as another error."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_told() -> Iterator[None]:
    """Raise an interrupt as what it was.

    Threads are started and waited for by Python code (`threading.Condition`). An interrupt in the midst of
    that leaves it with a lock that it no longer holds, and `RuntimeError` is raised in the interrupt's place.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
