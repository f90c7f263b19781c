"""Products with a quantized matrix, and its expansion into numbers.

One row of x is bound by memory, and is multiplied with the packed codes. 2 to 16 rows go to tensor cores. For
more rows the matrix is expanded, a block of its rows at a time, and multiplied as any other.

These three computations round differently, so the caller picks one by the number of rows alone. From 2 to 16
rows, a row's result does not depend on the others.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.launching import launch, power_of_two, uses_tensor_cores
from model.quant.spec import COLUMNS, ROWS, QuantSpec

FEW = 16  # rows: the fewest that a tensor core multiplies
BLOCK = 1 << 25  # weights that are expanded at a time: enough to keep a GPU busy, and at most 128 MiB


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [N, K] whose streams follow one another as in `model.quant.streams`."""

    first: Tensor  # its first stream, uint8; the address of this serves for all
    spec: QuantSpec
    shape: tuple[int, int]


def multiply_one(x: Tensor, matrix: PackedMatrix) -> Tensor:  # [1, K] -> [1, N]
    from model.kernels import matrix_kernels

    (N, K), spec = matrix.shape, matrix.spec
    tile = OneRow.pick(N, K, spec.bits)
    y = x.new_empty(1, N)
    launch(
        matrix_kernels.multiply_one, (N // tile.rows,), aligned(x), matrix.first, y,
        N=N, K=K, **constants(spec), **tile.constants(), num_warps=tile.warps,
    )  # fmt: skip
    return y


def multiply_few(x: Tensor, matrix: PackedMatrix) -> Tensor:  # [M, K] -> [M, N], M up to `FEW`
    """The weights that are multiplied are those of `QuantizedTensor.dequantize` in x's dtype."""
    from model.kernels import matrix_kernels

    (N, K), M, spec = matrix.shape, x.shape[0], matrix.spec
    tile = FewRows.pick(N, K, uses_tensor_cores(x))
    split = tile.splits > 1
    out = x.new_empty(tile.splits, M, N, dtype=torch.float32 if split else x.dtype)
    launch(
        matrix_kernels.multiply_few, (N // tile.rows, tile.splits), x.contiguous(), matrix.first, out, M,
        N=N, K=K, **constants(spec), ROWS=tile.rows, PIECE=COLUMNS, PIECES=tile.pieces,
        SPLITS=tile.splits, num_warps=4, num_stages=1,
    )  # fmt: skip
    return functools.reduce(torch.add, out).to(x.dtype) if split else out[0]


def multiply_many(x: Tensor, matrix: PackedMatrix) -> Tensor:  # [M, K] -> [M, N]
    N, K = matrix.shape
    block = min(max(BLOCK // K // ROWS * ROWS, ROWS), N)  # rows of W
    out, expanded = x.new_empty(x.shape[0], N), x.new_empty(block, K)
    for start in range(0, N, block):
        W = expanded[: N - start]  # [n, K], n <= block
        expand(matrix, start, W)
        torch.mm(x, W.T, out=out[:, start : start + block])
    return out


def expand(matrix: PackedMatrix, start: int, out: Tensor) -> None:
    """Write rows of the matrix from `start` on as numbers into `out` [n, K], n a multiple of 16.

    They are bit for bit what `QuantizedTensor.dequantize` gives in out's dtype.
    """
    from model.kernels import matrix_kernels

    (N, K), spec = matrix.shape, matrix.spec
    pieces = min(32, power_of_two(K // COLUMNS))  # so that whole lines of the GPU's cache are stored
    grid = out.shape[0] // ROWS, -(-K // (COLUMNS * pieces))
    launch(
        matrix_kernels.expand, grid, matrix.first, out, start,
        N=N, K=K, **constants(spec), PIECE=COLUMNS, PIECES=pieces, num_warps=4,
    )  # fmt: skip


def constants(spec: QuantSpec) -> dict[str, int]:
    """A format as the kernels' constants. At 16 bits a group is one weight."""
    return {"BITS": spec.bits, "GROUP": max(spec.group_size, 1), "META": max(spec.meta_group_size, 1)}


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and at an address from which kernels can load 8 bytes at a time."""
    x = x.contiguous()
    return x if x.data_ptr() % 8 == 0 else x.clone()


@dataclass(frozen=True)
class OneRow:
    """The tile of a program that multiplies with one row of x: `rows` rows of the matrix, and of each
    `pieces` runs of `piece` weights at a time."""

    rows: int
    piece: int
    pieces: int
    warps: int

    @staticmethod
    @functools.cache
    def pick(N: int, K: int, bits: int) -> "OneRow":
        """Four threads share a piece of a block, with 4 rows each.

        All that a thread loads is under way at once. Of two blocks these are 256 bytes of codes if a piece is
        64 weights of 4 bits, which take 64 registers. Two blocks, because x is prepared for both together.
        With more, a matrix of 4096 rows would make too few programs for 100 or more multiprocessors.

        A row that is longer than 64 pieces takes several rounds. Then the next round is loaded while one is
        computed. So that both fit the registers, a piece is only 32 weights. At 8 bits it is one block.

        >>> OneRow.pick(4096, 4096, 4), OneRow.pick(4096, 14336, 4).piece, OneRow.pick(48, 96, 8)
        (OneRow(rows=32, piece=64, pieces=64, warps=8), 32, OneRow(rows=16, piece=32, pieces=4, warps=1))
        """
        rows = 32 if N % 32 == 0 and bits < 8 else 16
        piece = 64 if K % 64 == 0 and K <= 4096 else 32
        pieces = min(power_of_two(K // piece), 64)
        return OneRow(rows, piece, pieces, max(pieces // 8, 1))

    @staticmethod
    def plain(N: int) -> "OneRow":
        """Of a matrix that is not quantized: a piece is one weight, and 1024 of 4 rows are 32 for each of 128
        threads.

        >>> OneRow.plain(10)
        OneRow(rows=2, piece=1, pieces=1024, warps=4)
        """
        return OneRow(math.gcd(N, 4), 1, 1024, 4)

    def constants(self) -> dict[str, int]:
        """This tile as the kernels' constants."""
        return {"ROWS": self.rows, "PIECE": self.piece, "PIECES": self.pieces}


@dataclass(frozen=True)
class FewRows:
    """The tile of a program that multiplies with 2 to 16 rows of x: `rows` rows of the matrix, and of each
    `pieces` times 32 weights at a time. K is split between `splits` programs."""

    rows: int
    pieces: int
    splits: int

    @staticmethod
    @functools.cache
    def pick(N: int, K: int, tensor_cores: bool) -> "FewRows":
        """4 rows of a piece are one for a thread of 128. With fewer than 64 rows there are more of K instead.

        Without tensor cores a thread holds the numbers of a tile, each of them several times. So tiles are a
        quarter of that, which takes 128 registers.

        K is split evenly until there are 512 programs, about 4 to a multiprocessor, or each has 4 tiles left.

        >>> FewRows.pick(4096, 14336, True), FewRows.pick(28672, 4096, True)
        (FewRows(rows=64, pieces=8, splits=8), FewRows(rows=64, pieces=8, splits=2))
        >>> FewRows.pick(4096, 14336, False)
        FewRows(rows=32, pieces=4, splits=4)
        """
        rows = math.gcd(N, 64 if tensor_cores else 32)
        pieces = (512 if tensor_cores else 128) // rows
        tiles = -(-K // (COLUMNS * pieces))
        splits = 1
        while N // rows * splits < 512 and tiles >= 8 * splits:
            splits *= 2
        return FewRows(rows, pieces, splits)
