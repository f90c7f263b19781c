"""How many threads compute during an engine's calls.

PyTorch keeps this number for each thread of the program, and one more for threads that have not computed yet.
`torch.set_num_threads` sets the caller's number and that one, in 0.1 microseconds. So each call of an engine
sets its own number and then restores the caller's. Other threads keep theirs, except one whose very first
computation falls into such a call: it starts with the engine's number.
"""

import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.planning.cgroups import ROOT, processors

STACK = 9 << 20  # bytes of a thread's stack, as most systems set it, with what belongs to it


def usable_processors(root: Path = ROOT) -> int:
    """The number of processors that affinity and control group quotas allow this process, at least 1.

    Part of a processor counts as none. One thread too many would delay all others, since they wait for it.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    quota = processors(root)
    return count if quota is None else max(min(count, math.floor(quota)), 1)


def pick_threads(wanted: int | None = None, usable: int | None = None) -> int:
    """`wanted` if given. Otherwise the calling thread's number, which the program set or PyTorch picked, but
    no more than `usable` processors (None: those of `usable_processors`)."""
    if wanted is not None:
        return wanted
    return min(torch.get_num_threads(), usable_processors() if usable is None else usable)


@contextmanager
def using_threads(wanted: int | None = None, usable: int | None = None) -> Iterator[None]:
    """Inside, the calling thread computes with `pick_threads(wanted, usable)` threads."""
    own = torch.get_num_threads()
    if (count := pick_threads(wanted, usable)) == own:
        yield
        return
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(own)


def start_threads() -> None:
    """Start the threads that will compute for the calling thread. Raises `OSError` if memory is too short.

    OpenMP would start them with the first work for them. If memory were too short for their stacks then, its
    library would end the process. So this function asks for that much memory first.
    """
    mmap.mmap(-1, torch.get_num_threads() * STACK).close()
    torch.ones(torch.get_num_threads() << 15, device="cpu").add_(1)  # PyTorch uses a thread per 2^15 numbers
