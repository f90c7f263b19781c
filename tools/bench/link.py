"""How fast bytes reach the device, by size of copy. Where experts miss, this bounds the speed of decoding.

    pinned      from page-locked memory in one call: the best that the link does
    pieces      from page-locked memory in pieces, as the expert cache copies
    pageable    from ordinary memory in one call, for which the driver copies everything once more
    staged      from ordinary memory through two page-locked buffers, as the expert cache does where the
                system refuses to lock memory

And how fast the device reads its own memory, which is the bound where no expert misses. Without a GPU the
copies are within host memory: whole by all threads, or in pieces by the one thread that stands for a link.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from runtime.experts.arena import Arena, unlocked_remedy
from runtime.experts.cuda_link import CudaLink
from runtime.experts.link import HostLink, Link
from runtime.planning.device import pick_device
from runtime.shell.arguments import at_least_one
from runtime.units import format_bytes

BUFFER = 256 << 20  # bytes, each copied once per measurement: more than a processor's caches hold
SIZES = tuple(1 << power for power in range(16, 29, 2))  # bytes of a copy: 64 KiB to 256 MiB
EXPERT = 64 << 20  # bytes: the nearest of SIZES to an expert of Mixtral-8x7B at 2 to 4 bits
MEMORY = 1 << 30  # bytes read to measure the device's memory
CALLS = 20  # in a row, to measure a GPU's memory: its clock starts some microseconds before the first

Copy = Callable[[Tensor, Tensor], object]  # source, target [bytes] uint8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="(default: cuda if there is one)")
    parser.add_argument("--threads", type=at_least_one, metavar="N", help="(default: as an engine has)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="whose median counts (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return all figures.

    Raises `OptionError` or `DeviceError` for a device that is not there.
    """
    device = pick_device(args.device)
    sizes = [size for size in SIZES if size <= BUFFER]
    measured = measure_copies(device, sizes, args.repeats)
    copies = "no GPU: copies within host memory" if device.type == "cpu" else "from host memory to the device"
    if device.type == "cuda" and "pinned" not in measured:
        copies += f"; the driver does not lock memory: {unlocked_remedy()}"
    memory = measure_memory(device, args.repeats)
    give_back(device)
    return {
        "device": str(device),
        "copies": copies,
        "repeats": args.repeats,
        "memory_gb_per_s": memory / 1e9,
        "link_gb_per_s": [
            {"copies of": format_bytes(size)} | {kind: rates[n] / 1e9 for kind, rates in measured.items()}
            for n, size in enumerate(sizes)
        ],
    }


def measure_link(device: torch.device, repeats: int) -> float:
    """Bytes per second that reach the device in copies of about an expert's size, at best: from page-locked
    memory in one call, or staged where that is refused. On a CPU, what a `HostLink` without a limit copies.
    """
    [[rate]] = measure_copies(device, [min(EXPERT, BUFFER)], repeats, kinds=1).values()
    return rate


def measure_copies(
    device: torch.device, sizes: Sequence[int], repeats: int, kinds: int | None = None
) -> dict[str, list[float]]:
    """Bytes per second by kind of copy and by size: for all kinds of this machine, or the first `kinds`."""
    with closing(Arena(1, BUFFER, device.type == "cuda", device)) as arena:
        return copy_rates(device, arena, sizes, repeats, kinds)


def copy_rates(
    device: torch.device, arena: Arena, sizes: Sequence[int], repeats: int, kinds: int | None
) -> dict[str, list[float]]:
    locked = arena.berth(0)[:BUFFER].fill_(1)  # [BUFFER]; unwritten pages may all be one
    ordinary = locked if device.type == "cpu" else torch.ones(BUFFER, dtype=torch.uint8)
    target = torch.zeros(BUFFER, dtype=torch.uint8, device=device)
    copies = islice(ways(device, arena.pinned, locked, ordinary).items(), kinds)
    return {
        kind: [measure(device, source, target, size, copy, repeats) for size in sizes]
        for kind, (source, copy) in copies
    }


def ways(
    device: torch.device, pinned: bool, locked: Tensor, ordinary: Tensor
) -> dict[str, tuple[Tensor, Copy]]:
    """Each kind of copy that this machine has: from where, and how. `pinned` says whether `locked` really is.

    The first shows what the expert cache can hope for.
    """
    if device.type == "cpu":
        return {"pieces": (locked, in_pieces(HostLink())), "whole": (locked, whole)}
    staged = CudaLink(device, lambda source: False)  # to which no memory is page-locked
    slow = {"staged": (ordinary, in_pieces(staged)), "pageable": (ordinary, whole)}
    if not pinned:
        return slow
    return {"pinned": (locked, whole), "pieces": (locked, in_pieces(CudaLink(device)))} | slow


def whole(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def in_pieces(link: Link) -> Copy:
    """As the expert cache copies, without its thread."""

    def copy(source: Tensor, target: Tensor) -> None:
        link.begin(None)
        for start in range(0, source.numel(), link.piece):
            piece = slice(start, start + link.piece)
            link.move(link.prepare(source[piece], demand=True), target[piece], demand=True)

    return copy


def measure(
    device: torch.device, source: Tensor, target: Tensor, size: int, copy: Copy, repeats: int
) -> float:
    """Bytes per second of copies of `size` bytes, one after the other from end to end of both buffers, which
    are a multiple of that long."""
    parts = list(zip(source.split(size), target.split(size), strict=True))

    def work() -> None:
        for part, place in parts:
            copy(part, place)

    return source.numel() / median_seconds(work, device, repeats)


def measure_memory(device: torch.device, repeats: int) -> float:
    """Bytes per second that the device reads of its own memory, at best: in sums, of integers and of float32,
    and in a copy, whose bytes are both read and written. Which is fastest differs between devices.
    """
    numbers = torch.ones(MEMORY // 4, device=device)  # zeros might take no memory
    integers, (first, second) = numbers.view(torch.int64), numbers.chunk(2)
    calls = CALLS if device.type == "cuda" else 1

    def rate(work: Callable[[], object]) -> float:
        def many() -> None:
            for _ in range(calls):
                work()

        return numbers.nbytes * calls / median_seconds(many, device, repeats)

    return max(rate(integers.sum), rate(numbers.sum), rate(lambda: second.copy_(first)))


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of `repeats`, after one that does not count. The device is idle before and after each."""
    taken = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # all its streams


def give_back(device: torch.device) -> None:
    """Return freed memory to the device, before its free memory is planned or measured."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
