"""How much memory this machine has left, and what PyTorch and the driver take of a GPU beside tensors."""

import contextlib
import functools
import gc
import os
from pathlib import Path

import torch

from model.target import Target
from runtime.planning.cgroups import ROOT, memory_left, read_lines

HOST_MARGIN = 512 << 20  # left to the rest of the machine
# What the CUDA context takes of a GPU where that cannot be measured, and the most that counts as measured. If
# more is taken, other processes use the GPU too.
CONTEXT_BYTES = 448 << 20
MOST_CONTEXT = 1 << 30
# What comes after the context: kernels as they are first used, graphs, and what cuBLAS and cuDNN hold.
LATER_BYTES = 256 << 20
# PyTorch's allocator takes 2 MiB at a time for small tensors, 20 MiB for larger ones, and does so again for
# graphs.
ROUNDING_BYTES = 32 << 20
# PyTorch keeps a cuBLAS workspace for each thread and stream that multiplied. One thread loads and warms up,
# another one serves, and each uses the stream that computes and the one that captures. The stream of copies
# multiplies nothing. Each further thread that serves takes two more workspaces, which are not planned.
CUBLAS_WORKSPACES = 2 * 2
# What NCCL takes for a rank's connections to GPUs before and after it in the ring: an estimate, not measured.
NCCL_BYTES = 256 << 20
HOPPER = (9, 0)  # the first compute capability with large workspaces


def free_host_bytes(root: Path = ROOT) -> int | None:
    """Bytes of host memory that can be taken without swapping; None if the system does not tell.

    This is the smaller of what the kernel calls available and what this process's control groups still allow,
    because the kernel's number leaves out a container's limit.
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
    """Bytes of `device`'s memory that a plan may use; None if the system does not tell.

    A CPU keeps a margin. A GPU's number includes unused blocks that PyTorch's allocator holds, and the CUDA
    context, which a plan counts among `driver_bytes`. This call creates the context if there is none yet.
    """
    if device.type == "cuda":
        context = context_bytes(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused + context
    free = free_host_bytes()
    return None if free is None else max(free - HOST_MARGIN, 0)


@functools.cache
def context_bytes(device: torch.device) -> int:
    """What the CUDA context takes of a GPU; 0 for a CPU.

    The first call for a device measures everything that is taken outside of PyTorch's allocator, which is the
    context alone if no other process uses the GPU. A little of other processes' memory counts with it, which
    is safe. If they hold much, the result is `CONTEXT_BYTES`.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)  # creates the context
    taken = total - free - torch.cuda.memory_reserved(device)
    return taken if 0 < taken <= MOST_CONTEXT else CONTEXT_BYTES


def driver_bytes(target: Target) -> int:
    """What a process takes of a GPU outside of PyTorch's allocator, its context included; 0 for a CPU."""
    if not target.is_gpu:
        return 0
    return (context_bytes(target.device) if target.present else CONTEXT_BYTES) + LATER_BYTES


def overhead_bytes(target: Target) -> int:
    """What PyTorch's allocator takes of a GPU beside the tensors that a plan counts; 0 for a CPU.

    That is cuBLAS's workspaces, whose size depends on the compute capability, and what rounding loses. A
    hypothetical GPU counts as one with the largest workspaces.
    """
    if not target.is_gpu:
        return 0
    large = not target.present or target.capability is None or target.capability >= HOPPER
    workspace = 32 << 20 if large else (8 << 20) + (128 << 10)
    return CUBLAS_WORKSPACES * workspace + ROUNDING_BYTES


def reserve(device: torch.device, size: int) -> None:
    """Have PyTorch's allocator take `size` bytes of a GPU in one piece, and serve later tensors from it. Does
    nothing for a CPU.

    Otherwise the allocator would take memory for each size separately, and the sizes of an expert's
    activations differ from call to call with its number of rows.

    Raises `torch.OutOfMemoryError` if the GPU has less.
    """
    if device.type == "cuda":
        some = torch.ones(16, 16, device=device)
        some @ some  # cuBLAS takes its workspace now, and not out of that piece
        torch.empty(size, dtype=torch.uint8, device=device)


def release(device: torch.device) -> None:
    """Give back the unused memory that PyTorch's allocator holds of a GPU.

    This collects garbage, so the caller must hold no lock that a finalizer may take.
    """
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # while another engine captures
            torch.cuda.empty_cache()
