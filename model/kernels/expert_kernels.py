"""The Triton code of `experts.py`. They also take experts that are not quantized, as 16 bits."""

import triton
import triton.language as tl

from model.kernels.row_kernels import dot_rows, packed_blocks
from model.kernels.shared_kernels import rounded


@triton.jit
def gate_up(
    x: tl.tensor,  # [D]
    pool: tl.tensor,  # [slots, BLOB] *uint8
    slots: tl.tensor,  # [A]
    h: tl.tensor,  # [A, F]
    D: tl.constexpr,
    F: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    BLOB: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ABSENT: tl.constexpr,  # whether slots may be -1: such an expert is left out
    INTERPRETED: tl.constexpr,
) -> None:  # grid [F / ROWS, A]
    """`silu(w1 x) * w3 x`. Every operation is rounded to h's dtype, as if it stood alone."""
    dtype = h.dtype.element_ty
    first, choice = tl.program_id(0) * ROWS, tl.program_id(1)
    slot = tl.load(slots + choice)
    if ABSENT:  # noqa: SIM102
        if slot < 0:
            return
    w13 = pool + slot.to(tl.int64) * BLOB
    if BITS >= 8:
        gate = dot_rows(x, w13, first, 2 * F, D, BITS, GROUP, META, ROWS, PIECE, PIECES)
        up = dot_rows(x, w13, F + first, 2 * F, D, BITS, GROUP, META, ROWS, PIECE, PIECES)
    else:  # a block of w1 and one of w3 at once, for which x is prepared once; 8 bits take too many registers
        blocks = (first // 16, (F + first) // 16)
        gate, up = packed_blocks(x, w13, blocks, 2 * F, D, BITS, GROUP, META, PIECE, PIECES)
    gate = rounded(gate, dtype, INTERPRETED).to(tl.float32)
    up = rounded(up, dtype, INTERPRETED).to(tl.float32)
    silu = rounded(gate / (1.0 + tl.exp(-gate)), dtype, INTERPRETED).to(tl.float32)
    tl.store(h + choice * F + first + tl.arange(0, ROWS), rounded(silu * up, dtype, INTERPRETED))


@triton.jit
def down(
    h: tl.tensor,  # [A, F]
    pool: tl.tensor,  # [slots, BLOB] *uint8
    slots: tl.tensor,  # [A]
    ids: tl.tensor,  # [A], all different
    weights: tl.tensor,  # [A]
    y: tl.tensor,  # [D]
    D: tl.constexpr,
    F: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    BLOB: tl.constexpr,
    OFFSET: tl.constexpr,  # of w2 in a blob
    A: tl.constexpr,
    CHOICES: tl.constexpr,  # a power of two, at least A
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ABSENT: tl.constexpr,  # whether slots may be -1: such an expert is left out
    INTERPRETED: tl.constexpr,
) -> None:  # grid [D / ROWS]
    """The weighted sum of the experts' outputs, added in ascending order of id. Every operation is rounded to
    y's dtype."""
    dtype = y.dtype.element_ty
    first = tl.program_id(0) * ROWS
    choices = tl.arange(0, CHOICES)
    known = tl.load(ids + choices, mask=choices < A, other=2147483647)
    rank = tl.sum((known[None, :] < known[:, None]).to(tl.int32), axis=1)  # [CHOICES]
    total = tl.zeros([ROWS], tl.float32)
    for place in range(A):
        choice = tl.sum(tl.where((rank == place) & (choices < A), choices, 0), axis=0)
        slot = tl.load(slots + choice)
        w2 = pool + slot.to(tl.int64) * BLOB + OFFSET
        weight = rounded(tl.load(weights + choice).to(tl.float32), dtype, INTERPRETED).to(tl.float32)
        if ABSENT:
            if slot >= 0:
                part = dot_rows(h + choice * F, w2, first, D, F, BITS, GROUP, META, ROWS, PIECE, PIECES)
                part = rounded(part, dtype, INTERPRETED).to(tl.float32)
                part = rounded(part * weight, dtype, INTERPRETED).to(tl.float32)
                total = rounded(total + part, dtype, INTERPRETED).to(tl.float32)
        else:
            part = dot_rows(h + choice * F, w2, first, D, F, BITS, GROUP, META, ROWS, PIECE, PIECES)
            part = rounded(part, dtype, INTERPRETED).to(tl.float32)
            part = rounded(part * weight, dtype, INTERPRETED).to(tl.float32)
            total = tl.where(place == 0, part, rounded(total + part, dtype, INTERPRETED).to(tl.float32))
    tl.store(y + first + tl.arange(0, ROWS), total.to(dtype))
