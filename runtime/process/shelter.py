"""Work that no interrupt leaves half done."""

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

Result = TypeVar("Result")

Item = tuple[Callable[[], Any], "queue.SimpleQueue[tuple[bool, Any]]"]


class Shelter:
    """Does one piece of work after the other, in threads where no signal handler runs.

    Python runs handlers in the main thread, between any two steps of it. So what that thread asks for is done
    by another one: once, and to its end, however often the waiting is interrupted.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, name="shelter", daemon=True)
        self.thread.start()
        self.closed = False

    def do(self, work: Callable[[], Result]) -> Result:
        """Do `work` after what was asked for before, and return its result or raise its error. An interrupt
        ends the waiting, not the work."""
        if self.closed or threading.current_thread() is not threading.main_thread():
            with self.lock:
                return work()
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self.asked.put((work, answer))
        good, result = answer.get()
        if not good:
            raise result
        return cast(Result, result)

    def close(self) -> None:
        """End the thread when it has done all. What is asked for later is done in the caller's thread."""
        self.closed = True
        self.asked.put(None)

    def run(self) -> None:
        """What the thread does."""
        while (item := self.asked.get()) is not None:
            work, answer = item
            try:
                with self.lock:
                    result: tuple[bool, Any] = True, work()
            except BaseException as error:
                result = False, error
            answer.put(result)
            del item, work, answer, result  # which may be all that keeps something
