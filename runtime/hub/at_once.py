"""Several downloads at once, which end together."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoppedError(Exception):
    """Another download has failed, or the user has stopped all."""


def at_once(
    work: Callable[[Item, Callable[[], None]], Result], items: Iterable[Item], workers: int
) -> list[Result]:
    """Do the work for every item, in threads. Returns what it returns, in order.

    The work's second argument is to be called now and then. After an error of another item, or Ctrl-C, it
    raises an error that ends the work.
    """
    stopped = threading.Event()

    def go_on() -> None:
        if stopped.is_set():
            raise StoppedError

    pool = ThreadPoolExecutor(workers, thread_name_prefix="hub")
    try:
        futures = [pool.submit(work, item, go_on) for item in items]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
