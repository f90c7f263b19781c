"""Ctrl-C that surfaces as another error."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restore_interrupts() -> Iterator[None]:
    """Raise `KeyboardInterrupt` where Python's threading module has replaced it.

    Threads are started and awaited by Python code (`threading.Condition`). An interrupt inside that code can
    come between releasing a lock and taking it again. The code then releases a lock that it does not hold,
    which raises `RuntimeError` in place of the interrupt.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
