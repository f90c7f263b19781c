"""Any device, any dtype, any format: a few rows at a time become ordinary numbers, then an ordinary product.

A block of rows is small enough to stay in a CPU's cache from being made to being used, so the expanded
weights never travel to memory and back; on a GPU blocks are large, to keep it busy. Every weight is computed
in float32 and rounded once, so it is the number that `QuantizedTensor.dequantize` gives.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.linear import linear
from model.quant.packing import unpack
from model.quant.spec import QuantSpec
from model.quant.streams import Field, matrix_fields
from model.quant.tensor import QuantizedTensor
from model.rows import filled_up

CPU_BLOCK = 1 << 19  # weights: 2 MiB of float32
GPU_BLOCK = 1 << 24


class Blocks:
    """A matrix kept as files have it."""

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        self.matrix = QuantizedTensor.of(spec, shape, memory)

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        (N, K), M = self.matrix.shape, x.shape[0]
        x = filled_up(x)
        spec, scales, zeros = self.matrix.spec, self.matrix.group_scales(), self.matrix.group_zeros()
        step = min(max((CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK) // K, 1), N)
        wide = x.new_empty(step, K, dtype=torch.float32)
        rounded = wide if x.dtype == torch.float32 else torch.empty_like(wide, dtype=x.dtype)
        out = x.new_empty(x.shape[0], N)
        for start in range(0, N, step):
            rows = slice(start, min(start + step, N))
            n = rows.stop - start
            codes = unpack([plane[rows] for plane in self.matrix.planes()], spec.bits, spec.group_size)
            groups = wide[:n].view(n, -1, spec.group_size)  # [n, J, group_size]
            groups.copy_(codes.view_as(groups)).sub_(zeros[rows, :, None]).mul_(scales[rows, :, None])
            if rounded is not wide:
                rounded[:n].copy_(wide[:n])
            out[:, rows] = linear(x, rounded[:n])
        return out[:M]

    @staticmethod
    def fields(name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        return matrix_fields(name, shape, spec, offset)

    @staticmethod
    def store(matrix: QuantizedTensor, memory: Mapping[str, Tensor]) -> None:
        for name, stream in matrix.streams().items():
            memory[name].copy_(stream)
