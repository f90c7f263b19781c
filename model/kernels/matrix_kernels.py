"""The Triton code of `matrices.py`.

For up to 16 rows of x and for expansion, every weight is computed in float32 and rounded once to x's dtype.
So it is bit for bit what `QuantizedTensor.dequantize` gives.
"""

import triton
import triton.language as tl

from model.kernels.row_kernels import dot_rows
from model.kernels.shared_kernels import pieces_from, rounded, with_high


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
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [N / ROWS]
    first = tl.program_id(0) * ROWS
    sums = dot_rows(x, matrix, first, N, K, BITS, GROUP, META, ROWS, PIECE, PIECES)
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
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [N / ROWS, SPLITS]
    """Take PIECES pieces at a time, and of these 8 codes of each at a time. So a tensor core adds up 8 codes
    of every piece at once, and a thread needs few scales. x has 16 rows, zeros from row M on."""
    ALL: tl.constexpr = K // PIECE
    EACH: tl.constexpr = (ALL + SPLITS * PIECES - 1) // (SPLITS * PIECES) * PIECES
    dtype = x.dtype.element_ty
    block = (tl.program_id(0) * (ROWS // 16) + tl.arange(0, ROWS // 16))[:, None, None]
    r = tl.arange(0, 16)[None, None, :]
    m, wide = tl.arange(0, 16), tl.arange(0, PIECES * 8)
    begin = tl.program_id(1) * EACH
    sums = tl.zeros([16, ROWS], tl.float32)
    for start in range(begin, tl.minimum(begin + EACH, ALL), PIECES):
        p = (start + tl.arange(0, PIECES))[None, :, None]
        pieces = pieces_from(matrix, block, p, r, N, K, BITS, GROUP, META, PIECE)
        i = (start + wide // 8) * PIECE + wide % 8
        inputs = x + m[:, None] * K + i[None, :]
        mask = (m < M)[:, None] & (i < K)[None, :]
        for at in tl.static_range(PIECE // 8):
            w = rounded(eight_weights(pieces, BITS, PIECE, at), dtype, INTERPRETED)
            w = tl.permute(w, 1, 3, 0, 2).reshape(PIECES * 8, ROWS)
            values = tl.load(inputs + at * 8, mask=mask, other=0.0)
            if INTERPRETED:  # the interpreter multiplies bfloat16's bits; float32 holds the same numbers
                values, w = values.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(values, w, sums, input_precision="ieee")
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = (tl.program_id(1) * M + m)[:, None] * N + n[None, :]
    tl.store(out + at, rounded(sums, out.dtype.element_ty, INTERPRETED), mask=(m < M)[:, None])


@triton.jit
def four_weights(words: tl.tensor, scale: tl.tensor, zero: tl.tensor, BITS: tl.constexpr):
    """The weights [B, P, 16, 4] float32 of the codes in the lowest bits of the four bytes of words."""
    a = weights_at(words, scale, zero, BITS, 0)
    b = weights_at(words, scale, zero, BITS, 8)
    c = weights_at(words, scale, zero, BITS, 16)
    d = weights_at(words >> 8, scale, zero, BITS, 16)
    w = tl.join(tl.join(a, c), tl.join(b, d))
    return w.reshape(w.shape[0], w.shape[1], w.shape[2], 4)


@triton.jit
def weights_at(words: tl.tensor, scale: tl.tensor, zero: tl.tensor, BITS: tl.constexpr, LOW: tl.constexpr):
    """The weights float32 whose codes are the BITS bits from LOW on.

    As in `times_codes` these bits are a float32, and 2^127 times that is 2^(LOW - 22) times the code. The
    zero is made smaller in proportion, so the difference is exact, and the scale is made larger, which is
    exact up to 2^105.
    """
    number = (words & (((1 << BITS) - 1) << LOW)).to(tl.float32, bitcast=True)
    return tl.fma(number, 2.0**127, zero * -(2.0 ** (LOW - 22))) * (scale * 2.0 ** (22 - LOW))


@triton.jit
def eight_weights(pieces: tl.tuple, BITS: tl.constexpr, PIECE: tl.constexpr, AT: tl.constexpr):
    """The weights [BLOCKS, PIECES, 16, 8] float32 of 8 codes of each row and piece, from code 8 AT on."""
    low, high, scale, zero, step = pieces
    s = scale[AT * 8 * len(scale) // PIECE].to(tl.float32) * step[AT * 8 * len(step) // PIECE]
    z = zero[AT * 8 * len(zero) // PIECE].to(tl.float32) * (1.0 / (1 << (8 - BITS)))
    if BITS == 8:
        a, b = low[2 * AT], low[2 * AT + 1]
    elif BITS == 4:
        a, b = low[AT], low[AT] >> 4
    elif BITS == 3:
        high_bits = high[AT // 4] >> AT // 2 % 2 * 4
        a = with_high(low[AT // 2], high_bits, 0) >> AT % 2 * 4
        b = with_high(low[AT // 2], high_bits, 1) >> AT % 2 * 4
    else:
        a, b = low[AT // 2] >> AT % 2 * 4, low[AT // 2] >> AT % 2 * 4 + 2
    w = tl.join(four_weights(a, s, z, BITS), four_weights(b, s, z, BITS))
    return tl.permute(w, 0, 1, 2, 4, 3).reshape(w.shape[0], w.shape[1], w.shape[2], 8)


@triton.jit
def expand(
    matrix: tl.tensor,  # *uint8
    out: tl.tensor,  # [rows, K]
    first: tl.tensor,  # the row that goes to row 0 of out
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [rows / 16, K / PIECE / PIECES, rounded up]
    block = first // 16 + tl.program_id(0)
    start = tl.program_id(1) * PIECES
    p, r = (start + tl.arange(0, PIECES))[None, :, None], tl.arange(0, 16)[None, None, :]
    pieces = pieces_from(matrix, block, p, r, N, K, BITS, GROUP, META, PIECE)
    row, wide = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, PIECES * 16)
    for at in tl.static_range(PIECE // 16):
        w = tl.join(
            eight_weights(pieces, BITS, PIECE, 2 * at), eight_weights(pieces, BITS, PIECE, 2 * at + 1)
        )
        w = tl.permute(w, 0, 2, 1, 4, 3).reshape(16, PIECES * 16)
        i = (start + wide // 16) * PIECE + at * 16 + wide % 16
        w = rounded(w, out.dtype.element_ty, INTERPRETED)
        tl.store(out + row[:, None] * K + i[None, :], w, mask=(i < K)[None, :])
