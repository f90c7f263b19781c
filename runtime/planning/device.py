"""Picks the device to compute on, and the dtype."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from model.errors import quoted
from model.quant.backends import has_fast_product
from model.target import AMPERE, Target
from runtime.errors import DeviceError, OptionError


def pick_device(name: str | None) -> torch.device:
    """The device called `name`. None picks the first GPU that this build of torch has kernels for. If there
    is none it picks the CPU, with a warning if there are other GPUs.

    Raises `OptionError` if no device has such a name, and `DeviceError` if this machine does not have the
    device, or if this build has no kernels for it.
    """
    if name is None:
        return first_gpu() or torch.device("cpu")
    device = find_device(name)
    if device.type == "cuda" and (reason := without_kernels(device)):
        raise DeviceError(f"device {name}: {reason}; use --device cpu or install a build of torch for it")
    return device


def find_device(name: str | None) -> torch.device:
    """The same as `pick_device` without asking the GPU for its capability, which might take some of its
    memory. None picks the first GPU if there is one."""
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise OptionError(f"device is {quoted(name)}, and must be cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "finds no usable GPU" if torch.version.cuda else "is a build without CUDA"
        raise DeviceError(
            f"device {name}: torch {torch.__version__} {built}; use --device cpu or install a CUDA build"
        )
    index = int(match[1] or 0)
    if index >= torch.cuda.device_count():
        raise DeviceError(f"device {name}: there are {torch.cuda.device_count()}, numbered from cuda:0")
    return torch.device("cuda", index)


def first_gpu() -> torch.device | None:
    """The first GPU that this build of torch has kernels for. Warns if there are only other GPUs."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reasons = {torch.device("cuda", n): without_kernels(torch.device("cuda", n)) for n in range(count)}
    usable = [device for device, reason in reasons.items() if reason is None]
    if reasons and not usable:
        warnings.warn(
            f"computing on the CPU, because {next(iter(reasons.values()))}; install a build of torch for it",
            RuntimeWarning,
            stacklevel=3,
        )
    return usable[0] if usable else None


def without_kernels(device: torch.device) -> str | None:
    """The reason why this build of torch cannot compute on a GPU; None if it can.

    CUDA itself would report it only after everything is loaded, as "no kernel image".
    """
    capability = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    if has_kernels(capability, built):
        return None
    return (
        f"this GPU has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} "
        f"has kernels for {', '.join(built)}"
    )


def has_kernels(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether a build for these architectures runs on a GPU of this compute capability.

    Compiled code (`sm_86`) runs on its own capability and later ones of the same major number. Intermediate
    code (`compute_90`) runs on its own capability and all later ones. Code for an architecture that ends in a
    letter runs on that architecture only. If no name can be read, the answer is True.

    >>> built = ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"]
    >>> [has_kernels(found, built) for found in ((7, 0), (7, 5), (8, 9), (9, 0), (10, 0), (12, 1), (13, 0))]
    [False, True, True, True, False, True, True]
    """
    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name) for name in built]
    for match in filter(None, known):
        kind, letter, made = match[1], match[4], (int(match[2]), int(match[3]))
        if capability == made or (
            not letter and capability >= made and (kind == "compute" or capability[0] == made[0])
        ):
            return True
    return not any(known)


SMALL_MODEL = 1 << 28  # weights: 1 GiB in float32


def pick_dtype(
    name: str | None, target: Target, weights: int, quantized: bool = False, bfloat16: bool | None = None
) -> torch.dtype:
    """The dtype called `name`. None picks one for the target and a model with this number of weights.
    `bfloat16` says whether a CPU multiplies that in hardware; by default this one is asked.

    bfloat16 has float32's range, so it is the first choice where hardware multiplies it: GPUs from compute
    capability 8.0 on, CPUs with AVX-512 BF16 or AMX. Older GPUs get float16, and other CPUs float32. Small
    models get float32 on any CPU, because there a bfloat16 product of one row takes some 20 us to begin, and
    float32's takes half of that. Quantized weights have a fast product on a CPU, which computes in bfloat16.
    """
    if name is not None:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if target.capability is not None:
        return torch.bfloat16 if target.capability >= AMPERE else torch.float16
    if quantized and has_fast_product(torch.bfloat16, target):
        return torch.bfloat16
    if weights <= SMALL_MODEL:
        return torch.float32
    return torch.bfloat16 if (cpu_multiplies_bfloat16() if bfloat16 is None else bfloat16) else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return any(re.search(rf"\b{flag}\b", cpuinfo) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
