"""The machine that a figure was measured on."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """The CPU, the number of cores that this process may use, and versions; the GPU with its memory and
    driver if there is one."""
    about: dict[str, str | int] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return about | gpu() if torch.cuda.is_available() else about


def gpu() -> dict[str, str | int]:
    """The first GPU, as far as the system describes it."""
    properties = torch.cuda.get_device_properties(0)
    versions = {"driver": driver_version(), "cuda": torch.version.cuda, "triton": triton_version()}
    about: dict[str, str | int] = {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    return about | {name: version for name, version in versions.items() if version}


def driver_version(path: str = "/proc/driver/nvidia/version") -> str | None:
    """The version of NVIDIA's driver, from its kernel module (Linux only)."""
    try:
        return find_version(Path(path).read_text())
    except OSError:
        return None


def find_version(text: str) -> str | None:
    """
    >>> find_version("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build")
    '580.82.07'
    """
    match = re.search(r"\b\d{3,4}\.\d+(?:\.\d+)?\b", text)
    return match[0] if match else None


def triton_version() -> str | None:
    for name in ("triton", "pytorch-triton"):  # its names on PyPI and in PyTorch's own builds
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def cpu_name() -> str:
    """The processor's name from Linux, or elsewhere from the platform module."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
