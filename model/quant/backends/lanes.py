"""CPUs: numba's kernels multiply with the bytes of files, wherever these lie. They round activations to 8
bits.

See `model.kernels.cpu`. float32 is left to `Blocks`, which is the reference and rounds no activations.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from model.kernels.cpu import launching, products
from model.quant.spec import QuantSpec
from model.quant.streams import Field, matrix_fields
from model.quant.tensor import QuantizedTensor
from model.target import Target


class Lanes:
    """A matrix kept as files have it. A row's product has the same bits alone and among others, with any
    number of threads, and on any processor."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    universal: ClassVar[bool] = True
    independent: ClassVar[bool] = True

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        self.matrix = products.PackedMatrix(spec, shape, memory)

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        return products.multiply(x, self.matrix).to(x.dtype)

    def gated(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N / 2] float32
        return products.gate_up(x, self.matrix)

    @staticmethod
    def together(
        x: Tensor, w13: Sequence["Lanes"], w2: Sequence["Lanes"]
    ) -> Tensor:  # [1, D] -> [A, D] float32
        return products.experts_of_a_token(x, [m.matrix for m in w13], [m.matrix for m in w2])

    @staticmethod
    def unsupported(
        spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target
    ) -> str | None:
        if dtype == torch.float32:
            return "computes in bfloat16, not float32; choose the dtype bfloat16"
        return launching.unsupported()

    @staticmethod
    def kernels(spec: QuantSpec, gated: bool) -> list[Callable[[], object]]:
        names = ("round_rows", "product", "gate_up")[: 3 if gated else 2]
        return [*(partial(launching.compile_kernel, name, spec) for name in names), launching.compile_grids]

    @staticmethod
    def scratch_bytes(inputs: int, dtype: torch.dtype, target: Target) -> int:
        return 0  # activations and their rounded copies count as activations

    @staticmethod
    def fields(name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        return matrix_fields(name, shape, spec, offset)

    @staticmethod
    def store(matrix: QuantizedTensor, memory: Mapping[str, Tensor]) -> None:
        matrix.copy_to(memory)
