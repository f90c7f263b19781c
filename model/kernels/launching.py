"""Launching Triton's kernels, and finding out whether a device can run them."""

import functools
import re
import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from model.target import AMPERE, TURING, Target


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *tensors: Tensor | int, **values: float) -> None:
    """Launch `kernel` on x's device, with x first."""
    interpreted = x.device.type == "cpu"  # by TRITON_INTERPRET=1: there is no other way to run on one
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[grid](x, *tensors, **values, INTERPRETED=interpreted, enable_fp_fusion=False)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU that kernels are launched on. None in Triton's interpreter."""
    return Target.of(device).capability


def uses_tensor_cores(x: Tensor) -> bool:
    """Whether Triton multiplies matrices like x on tensor cores. If not, `tl.dot` is multiply-adds in
    float32, which takes more registers, so tiles have to be smaller."""
    capability = capability_of(x.device)
    return x.dtype.itemsize == 2 and (capability is None or capability >= AMPERE)


def unsupported(target: Target, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype` on this device, and the remedy. None if they can.

    A GPU of this machine has to compile one. A hypothetical GPU is judged by its compute capability.
    """
    if not target.is_gpu:
        return f"needs a CUDA device, not {target.device.type}"
    if target.capability is None:
        return "needs a CUDA device, and there is none here"
    needed = AMPERE if dtype == torch.bfloat16 else TURING
    if target.capability < needed:
        least, found = (".".join(str(part) for part in c) for c in (needed, target.capability))
        kind = " for bfloat16" if target.capability >= TURING else ""
        remedy = "use --dtype float16" if kind else "there is no other way"
        return f"needs a GPU of compute capability {least}{kind}, and this one has {found}; {remedy}"
    if not target.present:
        return None
    if find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"  # there are two projects
        return f"needs Triton, which is not installed; pip install {package}"
    return untried(target.device)


MEMORY = re.compile(r"out of memory|(cannot|can't|not enough|failed to) (allocate )?memory", re.IGNORECASE)


def untried(device: torch.device) -> str | None:
    """Why a kernel cannot be compiled, or could not be tried for want of memory. None if it can."""
    try:
        return uncompiled(device)
    except Exception as error:  # `uncompiled` raises only when memory runs out
        return f"needs to try a kernel, and there was no memory for that ({first_line(error)}); free some"


@functools.cache  # a missing compiler stays missing; an error that is raised is not kept
def uncompiled(device: torch.device) -> str | None:
    """Why a small kernel cannot be compiled. None if it can. Raises the error that reports a lack of memory,
    since the next try may succeed."""
    try:
        compile_one(device)
    except Exception as error:  # Triton's, the compiler process's or the driver's
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or MEMORY.search(str(error)):
            raise
        remedy = "install a C compiler (gcc) and Python's headers"
        return f"needs to compile kernels, and that failed ({first_line(error)}); {remedy}"
    return None


def compile_one(device: torch.device) -> None:
    """Compile and launch the smallest kernel."""
    from model.kernels import step_kernels

    number = torch.ones(1, device=device)
    launch(step_kernels.fetch, (1,), number, number, COUNT=1, WIDE=1, num_warps=1)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
