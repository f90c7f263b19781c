"""How fast bytes reach the device, by size of copy: the figure that decoding is bound by where experts miss.

    pinned      from page-locked memory, in one call: the best that the link does
    pieces      from page-locked memory, in pieces, as the expert cache has them copied
    pageable    from ordinary memory, in one call: the driver copies everything once more
    staged      from ordinary memory, by way of two page-locked buffers: what the expert cache does where the
                system refuses to lock memory

And how fast the device reads its own memory: the bound where no expert misses. On a machine without a GPU the
copies are within host memory: whole by all threads, in pieces by the one thread that stands for a link.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from runtime.experts.arena import Arena, unlocked_remedy
from runtime.experts.copying import HostLink, Link
from runtime.experts.cuda_link import CudaLink
from runtime.planning.device import choose_device
from runtime.shell.arguments import at_least_one
from runtime.units import format_bytes

BUFFER = 256 << 20  # bytes, each copied once per measurement: more than any cache holds
SIZES = tuple(1 << power for power in range(16, 29, 2))  # bytes of a copy: 64 KiB to 256 MiB
EXPERT = 64 << 20  # bytes: the nearest of SIZES to an expert of Mixtral-8x7B at 2 to 4 bits
MEMORY = 1 << 30  # bytes read to measure the device's memory
CALLS = 20  # on end, while a GPU's memory is measured: its clock starts some microseconds before the first

Copy = Callable[[Tensor, Tensor], object]  # source, target [bytes] uint8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="(default: cuda if there is one)")
    parser.add_argument("--threads", type=at_least_one, metavar="N", help="(default: as an engine has)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="medians of these (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return all figures.

    Raises `OptionError` or `DeviceError` for a device that is not there.
    """
    device = choose_device(args.device)
    measured = measure_copies(device, [size for size in SIZES if size <= BUFFER], args.repeats)
    copies = "no GPU: copies within host memory" if device.type == "cpu" else "from host memory to the device"
    if device.type == "cuda" and "pinned" not in measured:
        copies += f"; the driver does not lock memory: {unlocked_remedy()}"
    return {
        "device": str(device),
        "copies": copies,
        "bytes_per_measurement": BUFFER,
        "repeats": args.repeats,
        "link": measured,
        "memory": {"bytes": MEMORY, "bytes_per_s": measure_memory(device, args.repeats)},
    }


def measure_link(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second that reach the device in copies of about an expert's size, at best: from page-locked
    memory in one call, or staged where that is refused. On a CPU, what a `HostLink` without a limit copies.

    Its buffers, of `BUFFER` bytes on either side, are gone when it returns.
    """
    [[row]] = measure_copies(device, [min(EXPERT, BUFFER)], repeats, kinds=1).values()
    return row["bytes_per_s"]


def measure_memory(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second that the device reads of its own memory, at best: of sums, of integers and of float32,
    and of a copy, whose bytes are both read and written. Which is fastest differs from device to device.

    Its buffer, of `MEMORY` bytes, is gone when it returns.
    """
    try:
        return max(memory_rates(device, repeats))
    finally:
        give_back(device)


def measure_copies(
    device: torch.device, sizes: list[int], repeats: int, kinds: int | None = None
) -> dict[str, list[dict[str, float]]]:
    """For each kind of copy that this machine has, or the first few `kinds`, a row for each size."""
    arena = Arena(1, 1, BUFFER, device.type == "cuda", device)
    try:
        return copy_rates(device, arena, sizes, repeats, kinds)
    finally:
        arena.close()
        give_back(device)


def copy_rates(
    device: torch.device, arena: Arena, sizes: list[int], repeats: int, kinds: int | None
) -> dict[str, list[dict[str, float]]]:
    locked = arena.blob(0, 0).fill_(1)  # [BUFFER]; pages that nobody wrote may all be one
    ordinary = locked if device.type == "cpu" else torch.ones(BUFFER, dtype=torch.uint8)
    target = torch.zeros(BUFFER, dtype=torch.uint8, device=device)
    chosen = islice(ways(device, arena.pinned, locked, ordinary).items(), kinds)
    return {
        kind: [measure(device, source, target, size, copy, repeats) for size in sizes]
        for kind, (source, copy) in chosen
    }


def ways(
    device: torch.device, pinned: bool, locked: Tensor, ordinary: Tensor
) -> dict[str, tuple[Tensor, Copy]]:
    """Each kind of copy that this machine has: from where, and how. `pinned` says if `locked` really is.

    First the one that says what the expert cache can hope for.
    """
    if device.type == "cpu":
        return {"pieces": (locked, in_pieces(HostLink())), "whole": (locked, whole)}
    slow = {"staged": (ordinary, in_pieces(CudaLink(device, never))), "pageable": (ordinary, whole)}
    if not pinned:
        return slow
    return {"pinned": (locked, whole), "pieces": (locked, in_pieces(CudaLink(device)))} | slow


def never(source: Tensor) -> bool:
    """Whether ordinary memory is page-locked."""
    return False


def whole(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def in_pieces(link: Link) -> Copy:
    """As the expert cache has them copied, less the thread."""

    def copy(source: Tensor, target: Tensor) -> None:
        link.begin(None)
        for start in range(0, source.numel(), link.piece):
            piece = slice(start, start + link.piece)
            link.move(link.prepare(source[piece], urgent=True), target[piece], urgent=True)

    return copy


def measure(
    device: torch.device, source: Tensor, target: Tensor, size: int, copy: Copy, repeats: int
) -> dict[str, float]:
    """Seconds that a copy of `size` bytes takes among others like it: both buffers, a multiple of that long,
    are copied from end to end. The median of that, again and again; the first time does not count."""
    parts = list(zip(source.split(size), target.split(size), strict=True))

    def work() -> None:
        for part, place in parts:
            copy(part, place)

    each = median_seconds(work, device, repeats) / len(parts)
    return {"bytes": size, "seconds": each, "bytes_per_s": size / each}


def memory_rates(device: torch.device, repeats: int) -> list[float]:
    numbers = torch.ones(MEMORY // 4, device=device)  # zeros might take no memory
    integers, (first, second) = numbers.view(torch.int64), numbers.chunk(2)
    calls = CALLS if device.type == "cuda" else 1

    def rate(work: Callable[[], object]) -> float:
        def many() -> None:
            for _ in range(calls):
                work()

        return numbers.nbytes * calls / median_seconds(many, device, repeats)

    return [rate(integers.sum), rate(numbers.sum), rate(lambda: second.copy_(first))]


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of `repeats`, behind one that does not count."""
    return statistics.median([seconds(work, device) for _ in range(repeats + 1)][1:])


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """From a device that has nothing to do until it has nothing to do again."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # all its streams


def give_back(device: torch.device) -> None:
    """What has been freed, to whoever measures how much of the device's memory is taken."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def as_text(report: dict[str, Any]) -> str:
    """A table of sizes and kinds, in GB/s."""
    kinds: dict[str, list[dict[str, float]]] = report["link"]
    about = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [about, f"{report['device']}: {report['copies']}", ""]
    lines += [f"{'GB/s':>10}" + "".join(f"{kind:>10}" for kind in kinds)]
    for rows in zip(*kinds.values(), strict=True):
        size = format_bytes(int(rows[0]["bytes"]))
        lines += [f"{size:>10}" + "".join(f"{row['bytes_per_s'] / 1e9:10.2f}" for row in rows)]
    memory = f"{report['memory']['bytes_per_s'] / 1e9:.1f} GB/s"
    return "\n".join([*lines, "", f"memory of {report['device']}: {memory}"])
