"""How much memory this machine can still give."""

import contextlib
import functools
import gc
import os
from pathlib import Path

import torch

from runtime.planning.cgroups import ROOT, memory_left, read_lines

HOST_MARGIN = 512 << 20  # left to the rest of the machine
# Of a GPU: what the CUDA context takes, which is there as soon as the device is asked for its free memory, if
# that cannot be measured; and the most that counts as measured: more, and others have memory of it, too.
CONTEXT_BYTES = 448 << 20
MOST_CONTEXT = 1 << 30
# After that, and not measured: kernels as they are first used, graphs, and cuBLAS's and cuDNN's own.
LATER_BYTES = 256 << 20
# PyTorch's allocator takes small tensors 2 MiB at a time, larger ones 20, and apart for graphs and the rest.
ROUNDING_BYTES = 32 << 20
# PyTorch keeps a workspace of cuBLAS for each thread and stream that multiplied: the thread that loads and
# warms up, and one that serves, each on the stream that computes and on the one that captures. The stream of
# copies multiplies nothing. Each further thread that serves takes two more, which are not planned.
CUBLAS_WORKSPACES = 2 * 2


def free_host_bytes(root: Path = ROOT) -> int | None:
    """Bytes of host memory that can be taken without swapping, or None where the system does not tell.

    The smaller of what the kernel calls available and what this process's control groups still allow (a
    container's limit is not in the former).
    """
    limits = [available_bytes(root), memory_left(root)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def available_bytes(root: Path = ROOT) -> int | None:
    for line in read_lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes of `device`'s memory that this process can take; None if that cannot be told. On a CPU less a
    margin. On a GPU with what PyTorch keeps of blocks that nobody uses any more, and with the context, which
    this call makes if it is not there: `driver_bytes` are to come out of it."""
    if device.type == "cuda":
        context = context_bytes(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused + context
    free = free_host_bytes()
    return None if free is None else max(free - HOST_MARGIN, 0)


@functools.cache
def context_bytes(device: torch.device) -> int:
    """What the CUDA context takes of a GPU, measured when first asked for: all that is taken then, and not by
    PyTorch's allocator. That is the context alone where this process is alone on the GPU. What little others
    have counts with it, which is safe; where they have much, it is `CONTEXT_BYTES`. Nothing on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)  # which makes the context
    taken = total - free - torch.cuda.memory_reserved(device)
    return taken if 0 < taken <= MOST_CONTEXT else CONTEXT_BYTES


def driver_bytes(device: torch.device, context: int = CONTEXT_BYTES) -> int:
    """What a process takes of a device's memory outside of PyTorch's allocator, beginning with its context. A
    GPU need not be there."""
    return context + LATER_BYTES if device.type == "cuda" else 0


def overhead_bytes(device: torch.device, capability: tuple[int, int] | None = None) -> int:
    """What PyTorch's allocator takes of a GPU beside the tensors that a plan counts: cuBLAS's workspaces, by
    compute capability, and what it loses to rounding. None is a capability that is not known, which counts as
    the one that takes most."""
    if device.type != "cuda":
        return 0
    workspace = 32 << 20 if capability is None or capability >= (9, 0) else (8 << 20) + (128 << 10)
    return CUBLAS_WORKSPACES * workspace + ROUNDING_BYTES


def reserve(device: torch.device, size: int) -> None:
    """Have PyTorch's allocator take so many bytes of a GPU in one piece, and cut from that what is asked for
    from now on. Piece by piece it would take as much for every size there is: experts' rows are as many as
    routing has it, and differ from call to call. Nothing on a CPU.

    Raises `torch.OutOfMemoryError` if they are not there.
    """
    if device.type == "cuda":
        some = torch.ones(16, 16, device=device)
        some @ some  # before, and from elsewhere, cuBLAS takes its workspace
        torch.empty(size, dtype=torch.uint8, device=device)


def release(device: torch.device) -> None:
    """Give back what PyTorch's allocator keeps of a GPU though nobody uses it. Not to be called with a lock
    held that forgotten objects may want."""
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # in the midst of another engine's capture
            torch.cuda.empty_cache()
