"""Calls that block in C++, made so that Ctrl-C and a loss still come through."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar, cast

Result = TypeVar("Result")

POLL = 0.05  # seconds between two looks


def beside(work: Callable[[], Result], look: Callable[[], None]) -> Result:
    """Do `work` in a thread beside this one, and return its result or raise its error.

    `look` is called every 0.05 s, and may raise to give the work up. The thread, a daemon, then ends when the
    work does.
    """
    ended: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((True, work()))
        except BaseException as error:
            ended.put((False, error))

    thread = threading.Thread(target=run, name="beside", daemon=True)
    thread.start()
    while True:
        look()
        try:
            good, result = ended.get(timeout=POLL)
        except queue.Empty:
            continue
        thread.join()
        if good:
            return cast(Result, result)
        raise cast(BaseException, result)
