"""Who computes with an engine: one thread at a time, in the process that loaded it.

Python may run other code in the midst of a step, in the very thread that computes: a finaliser that the
garbage collector calls, or a signal's handler. If that code waited for its turn, it would wait for itself.
So the lock is one that the thread which holds it can take again, and what finds its own thread computing is
refused at once.
"""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from runtime.errors import RequestError

Result = TypeVar("Result")


class Nested(RequestError):
    """A request that begins in the midst of another of the same thread."""


class Turns:
    """Threads take turns; each is alone while it has one."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.RLock()  # C code throughout: no interrupt leaves it locked
        self.taken = False  # by the thread that holds the lock

    def take(self, work: Callable[[], Result]) -> Result:
        """What `work` gives. Waits while another thread has its turn.

        Raises `Nested` if this thread has it already, and `RequestError` as `check_process` does.
        """
        self.check_process()  # before anything else: in a fork, the lock's holder may not exist
        with self.lock:
            if self.taken:
                raise Nested(
                    "this thread is in the midst of another request to the engine, and a signal handler or "
                    "finaliser began this one; begin it when that request has ended"
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
        """Raises `RequestError` in a fork: threads do not survive it, be they ours or PyTorch's."""
        if self.forked:
            raise RequestError(
                f"the engine was loaded by process {self.process} and does not work in its fork "
                f"{os.getpid()}; load it there, or start that process anew (spawn)"
            )
