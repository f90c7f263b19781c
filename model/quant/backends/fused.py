"""GPUs from compute capability 7.5 on: Triton's kernels multiply with the packed bytes themselves, or expand
them in one pass. See `model.kernels.matrices`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.kernels import launching, matrices
from model.moe import gated
from model.quant.spec import ROWS, QuantSpec
from model.quant.streams import Field, matrix_fields
from model.quant.tensor import QuantizedTensor
from model.target import Target


class Fused:
    """A matrix kept as files have it."""

    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    universal: ClassVar[bool] = True
    independent: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        """The tensors of `memory` have to follow one another without gaps, as those of `fields` do."""
        first = memory["codes"]
        self.matrix = matrices.PackedMatrix(first, spec, shape)
        for field in self.fields("", shape, spec):
            stream = memory[field.name.lstrip(".")]
            start = stream.storage_offset() * stream.element_size()
            assert start == first.storage_offset() + field.offset, field
            assert stream.untyped_storage().data_ptr() == first.untyped_storage().data_ptr(), field

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        if x.shape[0] == 1:
            return matrices.multiply_one(x, self.matrix)
        multiply = matrices.multiply_few if 1 < x.shape[0] <= matrices.FEW else matrices.multiply_many
        return multiply(x, self.matrix)

    def gated(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N / 2]
        return gated(x, self)

    @staticmethod
    def together(x: Tensor, w13: Sequence[Any], w2: Sequence[Any]) -> None:
        return None

    @staticmethod
    def unsupported(
        spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target
    ) -> str | None:
        return launching.unsupported(target, dtype)

    @staticmethod
    def kernels(spec: QuantSpec, gated: bool) -> list[Callable[[], object]]:
        return []  # `runtime.gpu.warm_up` does it by computing with every number of rows

    @staticmethod
    def scratch_bytes(inputs: int, dtype: torch.dtype, target: Target) -> int:
        return max(matrices.BLOCK, ROWS * inputs) * dtype.itemsize

    @staticmethod
    def fields(name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        return matrix_fields(name, shape, spec, offset)

    @staticmethod
    def store(matrix: QuantizedTensor, memory: Mapping[str, Tensor]) -> None:
        matrix.copy_to(memory)
