"""GPUs of compute capability 8.0 and later: few rows of x are multiplied with the packed bytes themselves, by
the kernels of `triton_kernels.py`; for more rows a matrix is expanded, a block of rows at a time and in one
pass, and multiplied as any other.

Memory is as files are. Besides the product with one matrix there is an expert layer for one token, in two
launches for all of its experts, which are read from a pool of blobs by slot.

**What is the same bit for bit.** Every result depends on the input, the shapes, the kind of GPU and Triton's
version alone: not on time, and not on the slot or address that holds an expert. In `gate_up` and `down` an
expert is computed alike whichever others are with it: so one call for a token's experts, calls for one of
them at a time, and anything between give the same h and the same contributions; and `down` rounds and adds
contributions as `model.moe.OneToken` does, so adding up by `+`, in ascending order of id, what `down` gives
for each expert is the same sum too. From 2 to 16 rows, a row's result does not depend on the others.

**What is not.** One row, 2 to 16 rows and more rows are three computations, and an expert by `gate_up` and
`down` is another than by `Fused` and `F.silu`. All are within rounding of one another. A provider of experts
has to choose by the number of rows alone.

The sizes of tiles were chosen by arithmetic and from compiled code, and **have not been measured on a GPU**.
They are fixed, since to choose them by timing would make results depend on it.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from model.quant.backends.blocks import Blocks
from model.quant.spec import ROWS, QuantSpec
from model.quant.streams import Field, matrix_fields
from model.quant.tensor import QuantizedTensor

FEW = 16  # rows: what a tensor core multiplies at least
BLOCK = 1 << 25  # weights that are expanded at a time: enough to keep a GPU busy, and at most 128 MiB
CAPABILITY = (8, 0)  # below, there is no bfloat16


def unsupported(device: torch.device) -> str | None:
    """Why this backend cannot serve a matrix on this device, and what to do about it; None if it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and there is none here"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        needed, found = (".".join(str(part) for part in c) for c in (CAPABILITY, capability))
        return f"needs a GPU of compute capability {needed}, and this one has {found}; there is no other way"
    if find_spec("triton") is None:
        return "needs Triton, which is not installed; pip install triton"
    return untried(device)


MEMORY = re.compile(r"out of memory|(cannot|can't|not enough|failed to) (allocate )?memory", re.IGNORECASE)


def untried(device: torch.device) -> str | None:
    """The same where Triton is there, but has nothing to compile with, or no memory to try. The latter may be
    otherwise the next time."""
    try:
        return uncompiled(device)
    except Exception as error:  # `uncompiled` raises none but for want of memory
        return f"needs to try a kernel, and there was no memory for that ({first_line(error)}); free some"


@functools.cache  # it is the same all along, and found out again and again; what is raised is not kept
def uncompiled(device: torch.device) -> str | None:
    """Why a small kernel cannot be compiled. Raises what tells of memory that ran out."""
    from model.kernels import step

    try:
        numbers = torch.ones(1, 16, device=device)
        step.add_and_norm(numbers, numbers, numbers[0], numbers[0, :1])
    except Exception as error:  # of Triton, of the compiler's process, of the driver
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or MEMORY.search(str(error)):
            raise
        remedy = "install a C compiler (gcc) and Python's headers"
        return f"needs to compile kernels, and that failed ({first_line(error)}); {remedy}"
    return None


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass(frozen=True)
class OneRow:
    """The tile of a program that multiplies with one row of x."""

    rows: int
    groups: int
    warps: int

    @staticmethod
    @functools.cache
    def choose(K: int, bits: int, group_size: int) -> "OneRow":
        """2048 or 1024 bytes of a row (at 3 bits, of its low plane): 16 for each thread, at 2 bits 8, so that
        threads lie along K, and hardly any x is prepared twice. Whichever makes fewer columns in all where
        neither divides K, and the longer if that is the same.

        8 rows: with 4, compiled code has a twelfth more instructions for a weight, since x is prepared for
        every tile; with more, a matrix of 4096 rows would be too few programs for 100 and more
        multiprocessors. 4 where a tile has few warps, for the same reason; at 3 bits, where x takes most
        registers; and at 16 bits, where a group is one weight and instructions are few.

        >>> [OneRow.choose(K, 4, 64).groups * 64 for K in (4096, 14336, 6144, 256, 192)]
        [4096, 2048, 2048, 256, 256]
        >>> OneRow.choose(14336, 2, 16)
        OneRow(rows=8, groups=512, warps=8)
        """
        width = 2 if bits == 3 else bits
        sizes = [min(max(wanted * 8 // width, group_size), power_of_two(K)) for wanted in (2048, 1024)]
        columns = min(sizes, key=lambda size: -(-K // size) * size)
        warps = min(max(columns * width // 8 // (256 if bits == 2 else 512), 1), 8)
        return OneRow(8 if bits in (2, 4, 8) and warps >= 4 else 4, columns // group_size, warps)


@dataclass(frozen=True)
class FewRows:
    """The tile of a program that multiplies with 2 to 16 rows of x: `pieces` times `piece` bytes of so many
    rows of a matrix; and between how many programs K is split."""

    rows: int
    pieces: int
    piece: int
    splits: int

    @staticmethod
    @functools.cache
    def choose(N: int, K: int, bits: int, group_size: int) -> "FewRows":
        """128 bytes of a row are a line of cache; 32 rows of them, in float32, 32 registers of each of
        128 threads. 3 bits read three streams: half of that.

        K is split, evenly, until there are 512 programs, some 4 to a multiprocessor, or 8 tiles are left to
        each.

        >>> FewRows.choose(4096, 14336, 4, 64)
        FewRows(rows=32, pieces=4, piece=32, splits=4)
        >>> FewRows.choose(28672, 4096, 3, 128)
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
    """The tile of a program that makes packed weights numbers."""

    rows: int
    groups: int

    @staticmethod
    @functools.cache
    def choose(K: int, group_size: int) -> "Expansion":
        """4096 weights are 32 for each of 128 threads; 1024 of a row, unless groups are longer, so that lines
        of cache are stored whole. The rows of any block are a multiple of 16.

        >>> Expansion.choose(4096, 64), Expansion.choose(96, 16), Expansion.choose(8192, 4096)
        (Expansion(rows=4, groups=16), Expansion(rows=16, groups=8), Expansion(rows=1, groups=1))
        """
        columns = max(min(1024, power_of_two(K)), group_size)
        return Expansion(min(max(4096 // columns, 1), 16), columns // group_size)


def power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()


class Fused:
    """A matrix kept as files have it."""

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        """The tensors of `memory` have to follow one another without gaps, as `fields` has them."""
        self.spec, self.shape = spec, shape
        self.start = memory["codes"]  # a pointer to the first stream serves for all
        base = self.start.storage_offset()
        for field in self.fields("", shape, spec):
            stream = memory[field.name.lstrip(".")]
            assert stream.storage_offset() * stream.element_size() == base + field.offset, field
            assert stream.untyped_storage().data_ptr() == self.start.untyped_storage().data_ptr(), field

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        if x.shape[0] == 1:
            return self.one(x.contiguous())
        return self.few(x.contiguous()) if 1 < x.shape[0] <= FEW else self.many(x)

    def one(self, x: Tensor) -> Tensor:  # [1, K] -> [1, N]
        from model.kernels import matrix_kernels as triton_kernels

        N, K = self.shape
        tile = OneRow.choose(K, self.spec.bits, self.spec.group_size)
        y = x.new_empty(1, N)
        launch(
            triton_kernels.multiply_one, (N // tile.rows,), x, self.start, y,
            N=N, K=K, **constants(self.spec), ROWS=tile.rows, GROUPS=tile.groups, num_warps=tile.warps,
        )  # fmt: skip
        return y

    def few(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        from model.kernels import matrix_kernels as triton_kernels

        (N, K), M = self.shape, x.shape[0]
        tile = FewRows.choose(N, K, self.spec.bits, self.spec.group_size)
        split = tile.splits > 1
        out = x.new_empty(tile.splits, M, N, dtype=torch.float32 if split else x.dtype)
        launch(
            triton_kernels.multiply_few, (N // tile.rows, tile.splits), x, self.start, out, M,
            N=N, K=K, **constants(self.spec), ROWS=tile.rows, PIECES=tile.pieces, PIECE=tile.piece,
            SPLITS=tile.splits, num_warps=4,
        )  # fmt: skip
        return functools.reduce(torch.add, out).to(x.dtype) if split else out[0]

    def many(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        N, K = self.shape
        step = min(max(BLOCK // K // ROWS * ROWS, ROWS), N)
        out, block = x.new_empty(x.shape[0], N), x.new_empty(step, K)
        for start in range(0, N, step):
            W = block[: N - start]  # [n, K], n <= step
            self.expand(start, W)
            torch.mm(x, W.T, out=out[:, start : start + step])
        return out

    def expand(self, start: int, out: Tensor) -> None:
        """Rows of the matrix from `start` on, into `out` [n, K], n a multiple of 16: bit for bit what
        `QuantizedTensor.dequantize` gives in out's dtype."""
        from model.kernels import matrix_kernels as triton_kernels

        (N, K), tile = self.shape, Expansion.choose(self.shape[1], self.spec.group_size)
        grid = out.shape[0] // tile.rows, -(-K // (tile.groups * self.spec.group_size))
        launch(
            triton_kernels.expand, grid, self.start, out, start,
            N=N, K=K, **constants(self.spec), ROWS=tile.rows, GROUPS=tile.groups, num_warps=4,
        )  # fmt: skip

    @staticmethod
    def fields(name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        return Blocks.fields(name, shape, spec, offset)

    @staticmethod
    def store(matrix: QuantizedTensor, memory: Mapping[str, Tensor]) -> None:
        Blocks.store(matrix, memory)


@dataclass(frozen=True)
class ExpertForm:
    """What the blobs of a pool are: w13 [2 F, D], then w2 [D, F], both as `Fused` keeps them, or, at 16 bits,
    in the dtype of x, which may be float32."""

    spec: QuantSpec
    hidden: int  # D
    ffn: int  # F

    def w2_offset(self, dtype: torch.dtype) -> int:
        """Where w2 begins in a blob, in a model that computes in `dtype`."""
        return matrix_fields("w13", (2 * self.ffn, self.hidden), self.spec, dtype=dtype)[-1].end

    def tile(self, K: int) -> OneRow:
        return OneRow.choose(K, self.spec.bits, max(self.spec.group_size, 1))


def gate_up(x: Tensor, pool: Tensor, slots: Tensor, form: ExpertForm) -> Tensor:
    """`silu(w1 x) * w3 x` for each of A experts and one token, in one launch: [A, F] in x's dtype.

    x [1, D]; pool [S, blob bytes] uint8, whose rows are multiples of 16 bytes; slots [A] of any integer
    dtype, on x's device. Rounded where separate operations would round: w1 x, w3 x, silu, and the product.
    """
    from model.kernels import matrix_kernels as triton_kernels

    D, F, (A,) = form.hidden, form.ffn, slots.shape
    check(x, (1, D), pool, form)
    tile = form.tile(D)
    rows = math.gcd(F, tile.rows)
    h = x.new_empty(A, F)
    launch(
        triton_kernels.gate_up, (F // rows, A), x.contiguous(), pool, slots.contiguous(), h,
        D=D, F=F, **constants(form.spec), BLOB=pool.shape[1], ROWS=rows, GROUPS=tile.groups,
        num_warps=tile.warps,
    )  # fmt: skip
    return h


def down(
    h: Tensor, pool: Tensor, slots: Tensor, weights: Tensor, form: ExpertForm, ids: Tensor | None = None
) -> Tensor:
    """The sum over A experts of `weight * w2 h`, in one launch: [1, D] in h's dtype.

    h [A, F] from `gate_up`; weights [A], rounded to h's dtype first; slots [A] and ids [A] integers, each
    expert's own, the ids all different. A contribution is rounded, then its product with the weight, then
    each sum, in ascending order of id. Without ids, slots take their place: where slots lie in the order of
    ids.
    """
    from model.kernels import matrix_kernels as triton_kernels

    D, F, (A,) = form.hidden, form.ffn, slots.shape
    check(h, (A, F), pool, form)
    tile = form.tile(F)
    rows = math.gcd(D, tile.rows)
    slots = slots.contiguous()
    y = h.new_empty(1, D)
    launch(
        triton_kernels.down, (D // rows,), h.contiguous(), pool, slots,
        slots if ids is None else ids.contiguous(), weights.contiguous(), y,
        D=D, F=F, **constants(form.spec), BLOB=pool.shape[1], OFFSET=form.w2_offset(h.dtype),
        A=A, CHOICES=power_of_two(A), ROWS=rows, GROUPS=tile.groups, num_warps=tile.warps,
    )  # fmt: skip
    return y


def expert_pair(
    x: Tensor, pool: Tensor, slots: Tensor, weights: Tensor, form: ExpertForm, ids: Tensor | None = None
) -> Tensor:
    """What `model.moe.Experts` promises, for one token whose A experts are all in the pool: [1, D] from x
    [1, D], in two launches. The other arguments are as of `gate_up` and `down`."""
    return down(gate_up(x, pool, slots, form), pool, slots, weights, form, ids)


def check(x: Tensor, shape: tuple[int, int], pool: Tensor, form: ExpertForm) -> None:
    assert tuple(x.shape) == shape, (x.shape, shape)
    assert pool.dtype == torch.uint8 and pool.is_contiguous() and pool.shape[1] % 16 == 0, pool.shape
    w2 = matrix_fields("w2", (form.hidden, form.ffn), form.spec, form.w2_offset(x.dtype), x.dtype)
    assert pool.shape[1] >= w2[-1].end, (pool.shape, w2[-1].end)


def constants(spec: QuantSpec) -> dict[str, int]:
    return {"BITS": spec.bits, "GROUP": max(spec.group_size, 1), "META": max(spec.meta_group_size, 1)}


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *tensors: Tensor | int, **values: float) -> None:
    interpreted = x.device.type == "cpu"  # by TRITON_INTERPRET=1: there is no other way to run on one
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[grid](x, *tensors, **values, INTERPRETED=interpreted, enable_fp_fusion=False)
