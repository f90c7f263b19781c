"""Which device to compute on, and in which dtype."""

import re
from pathlib import Path

import torch

from model.quant.backends.int4pack import kernel_block
from runtime.errors import DeviceError, OptionError


def choose_device(name: str | None) -> torch.device:
    """`name` as a device of this machine; None is the first CUDA device if there is one, else the CPU.

    Raises `OptionError` if that is no device's name, `DeviceError` if this machine does not have it.
    """
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise OptionError(f"device is {name!r}, and must be cpu, cuda or cuda:N")
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


SMALL_MODEL = 1 << 28  # weights: 1 GiB in float32


def choose_dtype(
    name: str | None, device: torch.device, weights: int, quantised: bool = False
) -> torch.dtype:
    """The dtype called `name`, or what suits the device and a model of so many weights.

    bfloat16 has float32's range, so it is the first choice wherever hardware multiplies it: CUDA from compute
    capability 8.0, CPUs with AVX-512 BF16 or AMX. Older GPUs get float16, other CPUs float32, and so do small
    models on any CPU: a bfloat16 product of one row costs a CPU some 20 us before it begins, float32's half.
    Quantised weights have a fast product on a CPU, and that is in bfloat16.
    """
    if name is not None:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if quantised and kernel_block():
        return torch.bfloat16
    return torch.bfloat16 if weights > SMALL_MODEL and cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return any(re.search(rf"\b{flag}\b", cpuinfo) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
