"""The ways to multiply with a quantized matrix: one file each, one protocol, and one list to pick from."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from model.quant.backends.blocks import Blocks
from model.quant.backends.fused import Fused
from model.quant.backends.int4pack import Int4Pack
from model.quant.spec import QuantSpec
from model.quant.streams import Field, matrix_fields
from model.quant.tensor import QuantizedTensor
from model.target import Target


class Backend(Protocol):
    """One matrix [N, K], bound to the memory that holds it.

    The memory belongs to the caller, who may put another matrix of the same format there: a slot of experts.

    To add a backend, write such a class and list it in `BACKENDS`, before all that are slower:

    >>> class Floats:
    ...     "Keeps a matrix as float32: quick to multiply, but eight times as large as at 4 bits."
    ...     devices = ("cpu", "cuda")
    ...     def __init__(self, spec, shape, memory):
    ...         self.weight = memory["weight"]
    ...     def __call__(self, x):
    ...         return x @ self.weight.T.to(x.dtype)
    ...     @staticmethod
    ...     def unsupported(spec, shape, dtype, target):
    ...         return None if shape[0] <= 1024 else "takes up to 1024 rows; use fewer"
    ...     @staticmethod
    ...     def scratch_bytes(inputs, dtype, target):
    ...         return 0 if dtype == torch.float32 else 1024 * inputs * dtype.itemsize
    ...     @staticmethod
    ...     def fields(name, shape, spec, offset=0):
    ...         return [Field(f"{name}.weight", torch.float32, tuple(shape), offset)]
    ...     @staticmethod
    ...     def store(matrix, memory):
    ...         memory["weight"].copy_(matrix.dequantize())
    >>> cpu, backends = Target.of(torch.device("cpu")), (Floats, Blocks)
    >>> pick_backend(QuantSpec(4), (64, 64), torch.bfloat16, cpu, backends)[0].__name__
    'Floats'
    >>> pick_backend(QuantSpec(4), (2048, 64), torch.bfloat16, cpu, backends)[1]
    'takes up to 1024 rows; use fewer'
    """

    devices: ClassVar[tuple[str, ...]]  # the types of device that it is made for

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        """`memory` has the tensors that `fields` lists, by the last part of their names."""
        ...

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        """`x @ W.T` in x's dtype, which is the one that the backend was picked for."""
        ...

    @staticmethod
    def unsupported(
        spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target
    ) -> str | None:
        """Why it cannot multiply with such a matrix in `dtype` on this device, and the remedy: the end of a
        sentence that begins with "the fast product". None if it can."""
        ...

    @staticmethod
    def scratch_bytes(inputs: int, dtype: torch.dtype, target: Target) -> int:
        """What a product with a matrix of up to `inputs` columns allocates for expanded weights."""
        ...

    @staticmethod
    def fields(name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        """What it keeps of a matrix, from `offset` on and without gaps."""
        ...

    @staticmethod
    def store(matrix: QuantizedTensor, memory: Mapping[str, Tensor]) -> None:
        """Write a matrix, as files have it, to `memory`, as this backend keeps it."""
        ...


BACKENDS: tuple[type[Backend], ...] = (Fused, Int4Pack, Blocks)  # fastest first; the last takes all


def pick_backend(
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: torch.dtype,
    target: Target,
    backends: Sequence[type[Backend]] | None = None,
) -> tuple[type[Backend], str | None]:
    """The fastest backend for a matrix on this device, and why a faster one cannot serve it.

    On a CPU, float32 is the reference. It is computed plainly, and that needs no remark.
    """
    remark = None
    for backend in BACKENDS if backends is None else backends:
        if target.device.type in backend.devices:
            reason = backend.unsupported(spec, shape, dtype, target)
            if reason is None:
                reference = dtype == torch.float32 and not target.is_gpu
                return backend, None if reference else remark
            remark = remark or reason
    raise AssertionError((spec, shape, dtype, target))


def keeps_as_stored(backend: type[Backend], spec: QuantSpec, shape: Sequence[int]) -> bool:
    """Whether a backend keeps exactly the bytes that files have of such a matrix."""
    return backend.fields("", shape, spec) == matrix_fields("", shape, spec)


EASY = QuantSpec(4), (64, 64)  # a format and a shape that every backend takes


def has_fast_product(dtype: torch.dtype, target: Target) -> bool:
    """Whether this device multiplies quantized weights in `dtype` without a remark."""
    return pick_backend(*EASY, dtype, target)[1] is None


def scratch_bytes(inputs: int, dtype: torch.dtype, target: Target) -> int:
    """What a product with a quantized matrix of up to `inputs` columns allocates, at most.

    On a CPU formats and shapes decide, so every backend counts. On a GPU one backend takes all matrices.
    """
    serving = [backend for backend in BACKENDS if target.device.type in backend.devices]
    if target.is_gpu:
        serving = [pick_backend(*EASY, dtype, target)[0]]
    return max(backend.scratch_bytes(inputs, dtype, target) for backend in serving)
