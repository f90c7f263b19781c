"""How fast threads read this machine's memory: the bound of decoding."""

import time

import torch

from runtime.process.threads import using_threads

SIZE = 1 << 30  # bytes, more than caches hold
REPEATS = 5
METHOD = "PyTorch's sum of 1 GiB"  # one thread's is a fifth faster than a compiled loop's


def read_bandwidth(threads: int) -> float:
    """Bytes per second at best, because other programs can only make it slower."""
    numbers = torch.ones(SIZE // 8, dtype=torch.int64)  # zeros might take no memory
    times = []
    with using_threads(threads):
        for _ in range(REPEATS):
            start = time.perf_counter()
            numbers.sum()
            times.append(time.perf_counter() - start)
    return SIZE / min(times)
