"""How much memory this machine can still give."""

import os
from pathlib import Path

import torch

HOST_MARGIN = 512 << 20  # left to the rest of the machine
# Of a GPU: the CUDA context with its kernels and graphs (some 500 MiB on large ones), cuBLAS's workspace for
# two streams (2 x 32 MiB on Hopper, less elsewhere), and what PyTorch's allocator loses to rounding.
DRIVER_BYTES = 640 << 20
CGROUPS = (  # versions 2 and 1: folder, limit, use, and what of it is page cache that nobody is using
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_host_bytes() -> int | None:
    """Bytes of host memory that can be taken without swapping, or None where the system does not tell.

    The smaller of what the kernel calls available and what this process's control group still allows (a
    container's limit is not in the former).
    """
    limits = [available_bytes(), cgroup_bytes()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def cgroup_bytes() -> int | None:
    """What the control group's limit leaves. Files in its page cache count as used there, and are given up
    when memory is asked for: a checkpoint that has just been read must not seem to fill the machine."""
    for place, limit_file, used_file, cached in CGROUPS:
        folder = Path(place)
        try:
            limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
            counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return max(limit - used + int(counters[cached]), 0)
        except (OSError, ValueError, KeyError):  # no such group, or its limit is "max"
            continue
    return None


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes of `device`'s memory that this process can take; None if that cannot be told. On a CPU less a
    margin; on a GPU `driver_bytes` are among them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = free_host_bytes()
    return None if free is None else max(free - HOST_MARGIN, 0)


def driver_bytes(device: torch.device) -> int:
    """What a process takes of a device's memory beside its tensors."""
    return DRIVER_BYTES if device.type == "cuda" else 0
