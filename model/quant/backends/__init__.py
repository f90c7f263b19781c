"""The ways to multiply with a quantized matrix: one file each, one protocol, and one list to pick from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from model.quant.backends.blocks import Blocks
from model.quant.backends.fused import Fused
from model.quant.backends.int4pack import Int4Pack
from model.quant.backends.lanes import Lanes
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
    ...     devices, universal, independent = ("cpu", "cuda"), False, False
    ...     def __init__(self, spec, shape, memory):
    ...         self.weight = memory["weight"]
    ...     def __call__(self, x):
    ...         return x @ self.weight.T.to(x.dtype)
    ...     def gated(self, x):
    ...         return gated(x, self)
    ...     @staticmethod
    ...     def together(x, w13, w2):
    ...         return None
    ...     @staticmethod
    ...     def unsupported(spec, shape, dtype, target):
    ...         return None if shape[0] <= 1024 else "takes up to 1024 rows; use fewer"
    ...     @staticmethod
    ...     def kernels(spec, gated):
    ...         return []
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
    universal: ClassVar[
        bool
    ]  # whether it takes every format and shape, if it takes any in a dtype on a device
    independent: ClassVar[bool]  # whether a row's product has the same bits alone and among others

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        """`memory` has the tensors that `fields` lists, by the last part of their names."""
        ...

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        """`x @ W.T` in x's dtype, which is the one that the backend was picked for."""
        ...

    def gated(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N / 2]
        """An expert's inner values (`model.moe.gated`), if the matrix is w1 above w3: in x's dtype, or in
        float32 if the backend multiplies float32 with other matrices."""
        ...

    @staticmethod
    def together(x: Tensor, w13: Sequence[Any], w2: Sequence[Any]) -> Tensor | None:
        """The outputs of A experts for one token, x [1, D], from their matrices: [A, D] in x's dtype or in
        float32. None if it is as fast to compute one after the other. The bits are the same either way."""
        ...

    @staticmethod
    def unsupported(
        spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target
    ) -> str | None:
        """Why it cannot multiply with such a matrix in `dtype` on this device, and the remedy: the end of a
        sentence that begins with "the fast product". None if it can."""
        ...

    @staticmethod
    def kernels(spec: QuantSpec, gated: bool) -> list[Callable[[], object]]:
        """Calls that each compile, or find compiled, a kernel for matrices of this format, and for `gated`
        ones if asked to. Without these calls, the first product waits for it."""
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


BACKENDS: tuple[type[Backend], ...] = (Fused, Lanes, Int4Pack, Blocks)  # fastest first; the last takes all


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
    """Whether this device multiplies quantized weights in `dtype` without expanding them first."""
    return pick_backend(*EASY, dtype, target)[0] is not BACKENDS[-1]


def scratch_bytes(inputs: int, dtype: torch.dtype, target: Target) -> int:
    """What a product with a quantized matrix of up to `inputs` columns allocates, at most.

    Formats and shapes may decide which backend takes a matrix, so all of them count down to one that takes
    every matrix.
    """
    most, first = 0, BACKENDS.index(pick_backend(*EASY, dtype, target)[0])
    for backend in BACKENDS[first:]:
        if target.device.type in backend.devices:
            most = max(most, backend.scratch_bytes(inputs, dtype, target))
            if backend.universal:
                break
    return most
