"""Any device, any dtype, any format: a few rows at a time become ordinary numbers, then an ordinary product.

A block of rows stays in a CPU's cache from being expanded to being multiplied, so the numbers never travel to
memory and back. On a GPU blocks are large, to keep it busy.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.linear import linear
from model.moe import gated
from model.quant.packing import unpack
from model.quant.spec import ROWS, QuantSpec
from model.quant.streams import Field, matrix_fields
from model.quant.tensor import QuantizedTensor
from model.rows import filled_up
from model.target import Target

CPU_BLOCK = 1 << 19  # weights: 2 MiB of float32
GPU_BLOCK = 1 << 24
MOVED = (
    35  # bytes of a GPU's memory for a weight, about: codes, float32 and 16 bits are each written and read
)


class Blocks:
    """A matrix kept as files have it. Every weight is computed in float32 and rounded once, so it equals what
    `QuantizedTensor.dequantize` gives."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    universal: ClassVar[bool] = True
    independent: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        self.matrix = QuantizedTensor.of(spec, shape, memory)

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        (N, K), M = self.matrix.shape, x.shape[0]
        x = filled_up(x)  # see model/rows.py
        spec, scales, zeros = self.matrix.spec, self.matrix.group_scales(), self.matrix.group_zeros()
        block = min(max(block_weights(x.device) // K // ROWS, 1) * ROWS, N)  # rows
        wide = x.new_empty(block, K, dtype=torch.float32)
        rounded = wide if x.dtype == torch.float32 else torch.empty_like(wide, dtype=x.dtype)
        out = x.new_empty(x.shape[0], N)
        for start in range(0, N, block):
            rows = slice(start, min(start + block, N))
            n = rows.stop - start
            stored = slice(rows.start // ROWS, rows.stop // ROWS)
            codes = unpack([plane[stored] for plane in self.matrix.planes()], spec.bits)
            groups = wide[:n].view(n, -1, spec.group_size)  # [n, J, group_size]
            groups.copy_(codes.view_as(groups)).sub_(zeros[rows, :, None]).mul_(scales[rows, :, None])
            if rounded is not wide:
                rounded[:n].copy_(wide[:n])
            out[:, rows] = linear(x, rounded[:n])
        return out[:M]

    def gated(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N / 2]
        return gated(x, self)

    @staticmethod
    def together(x: Tensor, w13: Sequence[Any], w2: Sequence[Any]) -> None:
        return None

    @staticmethod
    def unsupported(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target) -> None:
        return None

    @staticmethod
    def kernels(spec: QuantSpec, gated: bool) -> list[Callable[[], object]]:
        return []

    @staticmethod
    def scratch_bytes(inputs: int, dtype: torch.dtype, target: Target) -> int:
        return max(block_weights(target.device), ROWS * inputs) * (
            4 + 2 + 2
        )  # as float32, in x's dtype, as codes

    @staticmethod
    def fields(name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        return matrix_fields(name, shape, spec, offset)

    @staticmethod
    def store(matrix: QuantizedTensor, memory: Mapping[str, Tensor]) -> None:
        matrix.copy_to(memory)


def block_weights(device: torch.device) -> int:
    """How many weights are expanded at a time."""
    return CPU_BLOCK if device.type == "cpu" else GPU_BLOCK
