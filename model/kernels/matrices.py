"""Products with a quantized matrix, and its expansion into numbers.

One row of x is bound by memory, and is multiplied with the packed codes. 2 to 16 rows go to tensor cores. For
more rows the matrix is expanded, a block of its rows at a time, and multiplied as any other.

These three computations round differently, so the caller picks one by the number of rows alone. From 2 to 16
rows, a row's result does not depend on the others.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.launching import launch, power_of_two
from model.quant.spec import ROWS, QuantSpec

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
    tile = OneRow.pick(K, spec.bits, spec.group_size)
    y = x.new_empty(1, N)
    launch(
        matrix_kernels.multiply_one, (N // tile.rows,), x.contiguous(), matrix.first, y,
        N=N, K=K, **constants(spec), ROWS=tile.rows, GROUPS=tile.groups, num_warps=tile.warps,
    )  # fmt: skip
    return y


def multiply_few(x: Tensor, matrix: PackedMatrix) -> Tensor:  # [M, K] -> [M, N], M up to `FEW`
    """The weights that are multiplied are those of `QuantizedTensor.dequantize` in x's dtype."""
    from model.kernels import matrix_kernels

    (N, K), M, spec = matrix.shape, x.shape[0], matrix.spec
    tile = FewRows.pick(N, K, spec.bits, spec.group_size)
    split = tile.splits > 1
    out = x.new_empty(tile.splits, M, N, dtype=torch.float32 if split else x.dtype)
    launch(
        matrix_kernels.multiply_few, (N // tile.rows, tile.splits), x.contiguous(), matrix.first, out, M,
        N=N, K=K, **constants(spec), ROWS=tile.rows, PIECES=tile.pieces, PIECE=tile.piece,
        SPLITS=tile.splits, num_warps=4,
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
    tile = Expansion.pick(K, spec.group_size)
    grid = out.shape[0] // tile.rows, -(-K // (tile.groups * spec.group_size))
    launch(
        matrix_kernels.expand, grid, matrix.first, out, start,
        N=N, K=K, **constants(spec), ROWS=tile.rows, GROUPS=tile.groups, num_warps=4,
    )  # fmt: skip


def constants(spec: QuantSpec) -> dict[str, int]:
    """A format as the kernels' constants. At 16 bits a group is one weight."""
    return {"BITS": spec.bits, "GROUP": max(spec.group_size, 1), "META": max(spec.meta_group_size, 1)}


@dataclass(frozen=True)
class OneRow:
    """The tile of a program that multiplies with one row of x: `rows` rows of the matrix, `groups` groups of
    each at a time."""

    rows: int
    groups: int
    warps: int

    @staticmethod
    @functools.cache
    def pick(K: int, bits: int, group_size: int) -> "OneRow":
        """2048 or 1024 bytes of a row; at 3 bits, of its low plane. A thread gets 16 bytes, at 2 bits 8, so
        threads lie along K and hardly any x is prepared twice. Of the two sizes the one that covers K with
        fewer columns is picked, and the larger if both cover it alike.

        8 rows. With 4, compiled code has a twelfth more instructions for a weight, since x is prepared for
        every tile. With more, a matrix of 4096 rows makes too few programs for 100 or more multiprocessors.
        For the same reason it is 4 rows where a tile has few warps. It is 4 at 3 bits, where x takes most
        registers, and at 16 bits, where a group is one weight and instructions are few.

        >>> [OneRow.pick(K, 4, 64).groups * 64 for K in (4096, 14336, 6144, 256, 192)]
        [4096, 2048, 2048, 256, 256]
        >>> OneRow.pick(14336, 2, 16)
        OneRow(rows=8, groups=512, warps=8)
        """
        width = 2 if bits == 3 else bits
        sizes = [min(max(wanted * 8 // width, group_size), power_of_two(K)) for wanted in (2048, 1024)]
        columns = min(sizes, key=lambda size: -(-K // size) * size)
        warps = min(max(columns * width // 8 // (256 if bits == 2 else 512), 1), 8)
        return OneRow(8 if bits in (2, 4, 8) and warps >= 4 else 4, columns // group_size, warps)


@dataclass(frozen=True)
class FewRows:
    """The tile of a program that multiplies with 2 to 16 rows of x: `rows` rows of the matrix, and of each
    `pieces` times `piece` bytes at a time. K is split between `splits` programs."""

    rows: int
    pieces: int
    piece: int
    splits: int

    @staticmethod
    @functools.cache
    def pick(N: int, K: int, bits: int, group_size: int) -> "FewRows":
        """128 bytes of a row are a line of the GPU's cache. 32 rows of them, in float32, are 32 registers of
        each of 128 threads. 3 bits read three streams, so 64 bytes of each.

        K is split evenly until there are 512 programs, about 4 to a multiprocessor, or each has 8 tiles left.

        >>> FewRows.pick(4096, 14336, 4, 64)
        FewRows(rows=32, pieces=4, piece=32, splits=4)
        >>> FewRows.pick(28672, 4096, 3, 128)
        FewRows(rows=32, pieces=4, piece=16, splits=1)
        """
        run = group_size * (1 if bits == 3 else bits) // 8  # bytes, or codes, of a part of a group
        piece = min(run, 64 if bits == 3 else 128)
        pieces = (64 if bits == 3 else 128) // piece
        rows = 32 if N % 32 == 0 else 16
        tiles = -(-K // group_size * (run // piece) // pieces)
        splits = 1
        while N // rows * splits < 512 and tiles >= 16 * splits:
            splits *= 2
        return FewRows(rows, pieces, piece, splits)


@dataclass(frozen=True)
class Expansion:
    """The tile of a program that expands packed weights: `rows` rows of the matrix, `groups` groups."""

    rows: int
    groups: int

    @staticmethod
    @functools.cache
    def pick(K: int, group_size: int) -> "Expansion":
        """4096 weights are 32 for each of 128 threads. They are 1024 of a row, or a group if that is longer,
        so that whole lines of the GPU's cache are stored. `rows` divides 16, and so the rows of any block.

        >>> Expansion.pick(4096, 64), Expansion.pick(96, 16), Expansion.pick(8192, 4096)
        (Expansion(rows=4, groups=16), Expansion(rows=16, groups=8), Expansion(rows=1, groups=1))
        """
        columns = max(min(1024, power_of_two(K)), group_size)
        return Expansion(min(max(4096 // columns, 1), 16), columns // group_size)
