"""What a figure was measured on."""

import os
import platform
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """CPU, its cores that this process may use, GPU if there is one, and versions."""
    about: dict[str, str | int] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def cpu_name() -> str:
    """The processor's name as Linux knows it, or what the platform module can say elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
