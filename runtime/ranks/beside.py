"""Calls that block in C++, made so that Ctrl-C and a loss still come through."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

Result = TypeVar("Result")

POLL = 0.05  # seconds between two looks
JOIN = 0.2  # seconds that work may take to end when it is given up


def beside(
    work: Callable[[], Result], look: Callable[[], None], give_up: Callable[[], None] = lambda: None
) -> Result:
    """Do `work` in a thread beside this one, and return its result or raise its error.

    `look` is called every 0.05 s, and may raise to give the work up. The thread, a daemon, then ends when
    the work does. `give_up` is called then, and may make that soon: a thread that comes back from C++ while
    Python shuts down ends the process with a signal.
    """
    ended: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((True, work()))
        except BaseException as error:
            ended.put((False, error))

    thread = threading.Thread(target=run, name="beside", daemon=True)
    thread.start()
    try:
        while True:
            look()
            with suppress(queue.Empty):
                good, result = ended.get(timeout=POLL)
                break
    except BaseException:
        give_up()
        thread.join(JOIN)
        raise
    thread.join()
    if good:
        return cast(Result, result)
    raise cast(BaseException, result)
