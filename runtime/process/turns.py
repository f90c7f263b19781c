"""One thread at a time computes with an engine, and only in the process that loaded it.

Python may run other code in the thread that computes: a finalizer that the garbage collector calls, or a
signal handler. If that code waited for a turn, it would wait for its own thread, forever. So the lock is
reentrant, and a thread that asks for a second turn is refused at once.
"""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from runtime.errors import RequestError

Result = TypeVar("Result")


class Nested(RequestError):
    """A request that begins while the same thread serves another."""


class Turns:
    """Lets one thread compute while the others wait."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.RLock()  # C code throughout, so no interrupt leaves it locked
        self.taken = False  # by the thread that holds the lock

    def take(self, work: Callable[[], Result]) -> Result:
        """Wait for a turn, do `work` and return its result.

        Raises `Nested` if this thread has a turn already, and `RequestError` in a fork.
        """
        self.check_process()  # first of all, because in a fork the lock's holder may not exist
        with self.lock:
            if self.taken:
                raise Nested(
                    "this thread is still serving another request of the engine, which a signal handler or "
                    "finalizer interrupted to begin this one; begin it when that request has ended"
                )
            try:
                self.taken = True
                return work()
            finally:
                self.taken = False

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that loaded the engine."""
        return os.getpid() != self.process

    def check_process(self) -> None:
        """Raises `RequestError` in a fork, because neither our threads nor PyTorch's exist there."""
        if self.forked:
            raise RequestError(
                f"the engine was loaded by process {self.process} and does not work in its fork "
                f"{os.getpid()}; start that process anew (spawn) and load it there"
            )
