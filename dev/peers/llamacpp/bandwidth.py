"""How fast threads read this machine's memory: the bound of decoding."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from runtime.errors import OptionError

SIZE = 1 << 30  # bytes, more than caches hold
REPEATS = 5
METHOD = "sums of int64 by numba"


def read_bandwidth(threads: int) -> float:
    """Bytes per second, at best, of sums over one large array, of which each thread has an equal part. The
    best counts, because other programs can only make it slower."""
    add = compiled_sum()
    parts = np.array_split(np.ones(SIZE // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(add, parts))
            times.append(time.perf_counter() - start)
    return SIZE / min(times)


@cache
def compiled_sum() -> Any:
    """A sum of an array that lets other threads run."""
    try:
        import numba
    except ImportError:
        raise OptionError("numba is not installed; pip install numba") from None

    @numba.njit(nogil=True)
    def add(numbers: np.ndarray) -> int:
        total = 0
        for n in numbers:
            total += n
        return total

    add(np.ones(2, np.int64))  # which compiles it
    return add
