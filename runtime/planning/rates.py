"""How fast experts come from host memory and from files, measured in a fraction of a second.

A measurement never fails a load. What cannot be measured is unknown, and a plan then does without it. The
rates decide nothing: they tell the user what to expect.
"""

import contextlib
import functools
import io
import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from runtime.errors import DeviceError
from runtime.experts.arena import DIRECT, Arena
from runtime.experts.files import PART, READERS
from runtime.planning.memory import release
from runtime.planning.plan import Plan

LINK_BYTES = 32 << 20  # copied at a time, about an expert
LINK_COPIES = 6  # 16 ms at 12 GB/s
SECONDS = 0.1  # for each way to read

Run = tuple[Path, int, int]  # bytes of a file: path, offset, number


@dataclass(frozen=True)
class DiskRates:
    """GB/s of reading files past the system's page cache, and through it; None if it cannot be done."""

    direct: float | None = None
    buffered: float | None = None

    @property
    def go_direct(self) -> bool:
        """Whether experts are to be read past the page cache. That is better even if it is a little slower,
        because the cache would fill memory with a second copy of them."""
        return self.buffered is None or (self.direct or 0.0) > 0.8 * self.buffered

    @property
    def reading(self) -> float | None:
        """The rate at which experts are read."""
        return self.direct if self.go_direct else self.buffered


def with_rates(plan: Plan, runs: Sequence[Run] = ()) -> Plan:
    """The plan with the rates that the options leave open, as far as there is something to measure: the link
    of a GPU, and the disk with `runs` of bytes of its files, if experts are read from files."""
    if plan.resident:
        return plan
    link, disk, direct = plan.link_gbps, plan.disk_gbps, plan.direct_reads
    if link is None and plan.device.type == "cuda":
        link = measure_link(plan.device)
    if disk is None and plan.tiered:
        rates = measure_disk(runs)
        disk, direct = rates.reading, rates.go_direct
    return replace(plan, link_gbps=link, disk_gbps=disk, direct_reads=direct)


@functools.cache
def measure_link(device: torch.device) -> float | None:
    """GB/s of copying page-locked memory to a GPU; None if the driver locks none, or memory is short."""
    try:
        with closing(Arena(1, LINK_BYTES, pin=True, device=device)) as arena:
            rate = copy_gbps(arena, device) if arena.pinned else None
        release(device)
    except (RuntimeError, DeviceError):
        return None
    return rate


def copy_gbps(arena: Arena, device: torch.device) -> float:
    """GB/s of copying the arena's only berth, at best."""
    source = arena.berth(0).fill_(1)  # unwritten pages may all be one
    target = torch.empty_like(source, device=device)
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(LINK_COPIES + 1)]
        for mark in marks:
            mark.record()
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
    milliseconds = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return LINK_BYTES / min(milliseconds) / 1e6


def measure_disk(runs: Sequence[Run]) -> DiskRates:
    """The rates of reading these runs of bytes, a part of them each way, several pieces at once.

    Bytes that are in the page cache already would be read at memory's speed. So the system is asked to drop
    those that are read through it.
    """
    pieces = [piece for run in runs for piece in cut(run)]
    direct = getattr(os, "O_DIRECT", None)
    return DiskRates(
        None if direct is None else read_gbps(pieces[::2], direct),
        read_gbps(pieces[1::2] or pieces, 0, drop=True),
    )


def cut(run: Run) -> Iterator[Run]:
    """The whole pieces of `PART` in a run, which begin on multiples of `DIRECT`; of a shorter run what
    is left of it between such multiples.

    >>> list(cut(("f", 5000, 20000)))
    [('f', 8192, 16384)]
    """
    path, offset, size = run
    first, end = -(-offset // DIRECT) * DIRECT, (offset + size) // DIRECT * DIRECT
    piece = min(PART, end - first)
    if piece > 0:
        yield from ((path, start, piece) for start in range(first, end - piece + 1, piece))


def read_gbps(pieces: Sequence[Run], flags: int, drop: bool = False) -> float | None:
    """GB/s of reading pieces for `SECONDS`, or until they end; None if the system refuses one."""
    left, lock, done, failed = iter(pieces), threading.Lock(), [0] * READERS, threading.Event()
    deadline = time.perf_counter() + SECONDS

    def read(reader: int) -> None:
        with mmap.mmap(-1, PART) as memory:  # begins on a page, as direct reads want it
            while time.perf_counter() < deadline and not failed.is_set():
                with lock:
                    piece = next(left, None)
                if piece is None:
                    return
                try:
                    done[reader] += read_piece(piece, memory, flags, drop)
                except (OSError, ValueError):
                    failed.set()

    start = time.perf_counter()
    threads = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return None if failed.is_set() or not sum(done) else sum(done) / (time.perf_counter() - start) / 1e9


def read_piece(piece: Run, memory: mmap.mmap, flags: int, drop: bool) -> int:
    """Read a piece into the beginning of `memory`. Returns the number of bytes. Raises `OSError`, also if
    there are fewer."""
    path, offset, size = piece
    file = os.open(path, os.O_RDONLY | flags)
    with io.FileIO(file, closefd=True) as source:
        if drop and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)
        source.seek(offset)
        with memoryview(memory) as view, view[:size] as part:
            if source.readinto(part) != size:
                raise OSError(f"{path}: cut short")
    return size
