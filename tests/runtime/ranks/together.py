"""Ranks as threads of this process."""

import threading
from collections.abc import Callable
from typing import Any

from torch.distributed import HashStore, PrefixStore

from runtime.ranks.meeting import Meeting

TIMEOUT = 10.0  # seconds: on a busy machine a thread may have to wait for some


def together(size: int, work: Callable[[Meeting], Any], timeout: float = TIMEOUT) -> list[Any]:
    """What `work` returns or raises on each of `size` ranks, which run at the same time. Meetings are
    closed."""
    store, results = HashStore(), [None] * size

    def rank(index: int) -> None:
        try:
            with Meeting(PrefixStore("test", store), index, size, timeout, patience=10) as meeting:
                results[index] = work(meeting)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def succeed(size: int, work: Callable[[Meeting], Any]) -> list[Any]:
    """`together`, where nothing may be raised."""
    results = together(size, work)
    if errors := [result for result in results if isinstance(result, BaseException)]:
        raise errors[0]
    return results
