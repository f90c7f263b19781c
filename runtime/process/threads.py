"""How many threads compute, for as long as an engine does and no longer.

PyTorch keeps the number for each thread of a program, and one more for threads that have not computed yet;
`torch.set_num_threads` sets the caller's and that one, in 0.1 microseconds. So a program's threads have their
own number again after each call of an engine. Only a thread whose very first computation falls into such a
call begins with the engine's number.
"""

import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.planning.cgroups import ROOT, processors


def usable_processors(root: Path = ROOT) -> int:
    """The processors that this process may use, by its affinity and its control groups' quotas.

    A part of one is none: a thread more than there is time for delays all others, which wait for it.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    quota = processors(root)
    return count if quota is None else max(min(count, math.floor(quota)), 1)


def choose_threads(wanted: int | None = None, usable: int | None = None) -> int:
    """`wanted`, or if None the calling thread's own number, which the program has set or PyTorch chose, but
    no more than the `usable` processors (None: those of `usable_processors`)."""
    if wanted is not None:
        return wanted
    return min(torch.get_num_threads(), usable_processors() if usable is None else usable)


@contextmanager
def computing(wanted: int | None = None, usable: int | None = None) -> Iterator[None]:
    """While inside, the calling thread computes with as many threads as `choose_threads` says."""
    own = torch.get_num_threads()
    if (count := choose_threads(wanted, usable)) == own:
        yield
        return
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(own)


STACK = 9 << 20  # bytes of a thread's stack, as systems commonly have it, and what belongs to it


def start_threads() -> None:
    """Start the threads that will compute for the calling thread.

    OpenMP starts them when there is first something to do for them, and where memory is too short for their
    stacks then, its library ends the process. So this asks for as much memory first.

    Raises `OSError` if it is not there.
    """
    mmap.mmap(-1, torch.get_num_threads() * STACK).close()
    torch.ones(torch.get_num_threads() << 15, device="cpu").add_(1)  # 2^15 numbers are worth a thread
