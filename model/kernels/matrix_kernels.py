"""The Triton code of `matrices.py`.

For up to 16 rows of x and for expansion, every weight is computed in float32 and rounded once to x's dtype.
So it is bit for bit what `QuantizedTensor.dequantize` gives.
"""

import triton
import triton.language as tl

from model.kernels.shared_kernels import dot_rows, rounded, scales_and_zeros


@triton.jit
def multiply_one(
    x: tl.tensor,  # [K]
    matrix: tl.tensor,  # *uint8
    y: tl.tensor,  # [N]
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [N / ROWS]
    first = tl.program_id(0) * ROWS
    sums = dot_rows(x, matrix, first, N, K, BITS, GROUP, META, ROWS, GROUPS)
    tl.store(y + first + tl.arange(0, ROWS), rounded(sums, y.dtype.element_ty, INTERPRETED))


@triton.jit(do_not_specialize=["M"])
def multiply_few(
    x: tl.tensor,  # [M, K]
    matrix: tl.tensor,  # *uint8
    out: tl.tensor,  # [SPLITS, M, N]
    M: tl.tensor,  # at most 16
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [N / ROWS, SPLITS]
    """Take PIECES pieces at a time, each PIECE bytes of a group. x has 16 rows, zeros from row M on."""
    J: tl.constexpr = K // GROUP
    PARTS: tl.constexpr = 8 if BITS == 3 else 8 // BITS  # at 3 bits those of the high plane
    RUN: tl.constexpr = GROUP // PARTS
    A_GROUP: tl.constexpr = RUN // PIECE
    ALL: tl.constexpr = J * A_GROUP
    EACH: tl.constexpr = (ALL + SPLITS * PIECES - 1) // (SPLITS * PIECES) * PIECES
    WIDE: tl.constexpr = PIECES * PIECE
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, 16)
    wide = tl.arange(0, WIDE)
    begin = tl.program_id(1) * EACH
    sums = tl.zeros([16, ROWS], tl.float32)
    for start in range(begin, tl.minimum(begin + EACH, ALL), PIECES):
        j = (start + tl.arange(0, PIECES)) // A_GROUP
        scale, zero = scales_and_zeros(matrix, n, j, j < J, N, K, BITS, GROUP, META)
        scale = tl.broadcast_to(scale[:, :, None], [ROWS, PIECES, PIECE]).reshape(ROWS, WIDE)
        zero = tl.broadcast_to(zero[:, :, None], [ROWS, PIECES, PIECE]).reshape(ROWS, WIDE)
        piece = start + wide // PIECE
        group = piece // A_GROUP
        byte = piece % A_GROUP * PIECE + wide % PIECE  # of the group's part
        there = group < J
        if BITS == 3:
            low = matrix + n[:, None] * (K // 4) + (group * (2 * RUN) + byte)[None, :]
            even = tl.load(low, mask=there[None, :], other=0)
            odd = tl.load(low + RUN, mask=there[None, :], other=0)
            at = n[:, None] * (K // 8) + (group * RUN + byte)[None, :]
            packed = tl.load(matrix + N * K // 4 + at, mask=there[None, :], other=0)
        else:
            at = n[:, None] * (K // PARTS) + (group * RUN + byte)[None, :]
            packed = tl.load(matrix + at, mask=there[None, :], other=0)
        for part in tl.static_range(PARTS):
            if BITS == 3:
                low_plane = even if part % 2 == 0 else odd  # its parts are twice as long
                codes = ((low_plane >> (part // 2 * 2)) & 3) | (((packed >> part) & 1) << 2)
            else:
                codes = (packed >> (part * BITS)) & ((1 << BITS) - 1)
            w = rounded(
                (codes.to(tl.float32) - zero) * scale, x.dtype.element_ty, INTERPRETED
            )  # [ROWS, WIDE]
            inputs = m[:, None] * K + (group * GROUP + part * RUN + byte)[None, :]
            values = tl.load(x + inputs, mask=(m < M)[:, None] & there[None, :], other=0.0)
            if INTERPRETED:  # the interpreter multiplies bfloat16's bits; float32 holds the same numbers
                values, w = values.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(values, tl.trans(w), sums, input_precision="ieee")
    at = (tl.program_id(1) * M + m)[:, None] * N + n[None, :]
    tl.store(out + at, rounded(sums, out.dtype.element_ty, INTERPRETED), mask=(m < M)[:, None])


@triton.jit
def plane_codes(
    codes: tl.tensor,  # [N, K * WIDTH / 8] *uint8
    n: tl.tensor,  # [ROWS]
    j: tl.tensor,  # [GROUPS]
    there: tl.tensor,  # [GROUPS]
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):  # [ROWS, GROUPS, GROUP] int32
    """The codes of one plane in the order of weights.

    So whole lines of the GPU's cache are stored. A byte is loaded once for every part, but comes from the
    cache after the first time.
    """
    PARTS: tl.constexpr = 8 // WIDTH
    BYTES: tl.constexpr = GROUP // PARTS
    i = tl.arange(0, GROUP)
    at = n[:, None, None] * (K // PARTS) + j[None, :, None] * BYTES + (i % BYTES)[None, None, :]
    packed = tl.load(codes + at, mask=there[None, :, None], other=0).to(tl.int32)
    return (packed >> (i // BYTES * WIDTH)[None, None, :]) & ((1 << WIDTH) - 1)


@triton.jit
def expand(
    matrix: tl.tensor,  # *uint8
    out: tl.tensor,  # [rows, K]
    first: tl.tensor,  # the matrix's row that goes to row 0 of out
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [rows / ROWS, J / GROUPS, rounded up]
    J: tl.constexpr = K // GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    n, there = first + row, j < J
    if BITS == 3:
        codes = plane_codes(matrix, n, j, there, K, GROUP, 2)
        codes |= plane_codes(matrix + N * K // 4, n, j, there, K, GROUP, 1) << 2
    else:
        codes = plane_codes(matrix, n, j, there, K, GROUP, BITS)
    scale, zero = scales_and_zeros(matrix, n, j, there, N, K, BITS, GROUP, META)
    w = (codes.to(tl.float32) - zero[:, :, None]) * scale[:, :, None]
    at = row[:, None, None] * K + (j * GROUP)[None, :, None] + tl.arange(0, GROUP)[None, None, :]
    tl.store(out + at, rounded(w, out.dtype.element_ty, INTERPRETED), mask=there[None, :, None])
