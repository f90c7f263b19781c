"""The dot products of some rows of a matrix with one x, for the kernels of matrices and of experts.

They are bound by memory. Every byte of a matrix is read once, and sums are float32. A thread goes along a
piece, so it sums up a group, or a good part of one, without asking other threads. The bits of a code stay
where they are in the word. Instead x is made smaller in proportion, by a power of two, which is exact. Codes
are not converted to numbers either, because the bits of a small integer are those of a denormal float32.
Scale and zero come in once for a group, since the sum of (q - z) s x is s (sum of q x - z sum of x), and a
step once for all groups of a piece that share it.

What differs from block to block is in tuples. As a dimension of tensors, blocks may be spread over threads,
which depends on the compiler. But one thread shall have both of two blocks, and prepare x once.
"""

import triton
import triton.language as tl

from model.kernels.shared_kernels import pieces_from, with_high, with_last


@triton.jit
def four_inputs(x: tl.tensor, mask: tl.tensor):  # float32, four times
    """The number that x points to and the next three, at a multiple of four numbers."""
    if x.dtype.element_ty.primitive_bitwidth == 16:
        # One load. A tensor with a dimension of four would be spread over threads, and exchanged by them.
        both = tl.load(x.to(tl.pointer_type(tl.int64), bitcast=True), mask=mask, other=0)
        low, high = both.to(tl.int32), (both >> 32).to(tl.int32)
        if x.dtype.element_ty == tl.bfloat16:
            a = (low << 16).to(tl.float32, bitcast=True)
            b = (low & -65536).to(tl.float32, bitcast=True)
            c = (high << 16).to(tl.float32, bitcast=True)
            d = (high & -65536).to(tl.float32, bitcast=True)
        else:
            a = low.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            b = (low >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            c = high.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            d = (high >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        a = tl.load(x, mask=mask, other=0.0)
        b = tl.load(x + 1, mask=mask, other=0.0)
        c = tl.load(x + 2, mask=mask, other=0.0)
        d = tl.load(x + 3, mask=mask, other=0.0)
    return a, b, c, d


@triton.jit
def times_codes(
    x: tl.tensor,
    words: tl.tensor,  # int32
    sums: tl.tensor,  # float32
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # float32
    """Add x times the codes, which are the BITS bits from SHIFT on.

    As a float32, an integer below 2^24 is 2^-149 times that integer: a denormal number, or one with the least
    exponent. A GPU multiplies it exactly and at full speed. x may be up to 2^32, and keeps all its bits down
    to 2^-60.
    """
    LOW: tl.constexpr = SHIFT if SHIFT + BITS <= 24 else SHIFT - 8
    if SHIFT + BITS > 24:
        words = words >> 8
    number = words & (((1 << BITS) - 1) << LOW)
    return tl.fma(number.to(tl.float32, bitcast=True), x * (2.0**96 / (1 << LOW)), sums)


@triton.jit
def four_codes(a, b, c, d, words, sums, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """Add four numbers times the codes at the same place of the four bytes of words."""
    sums = times_codes(a, words, sums, BITS, SHIFT)
    sums = times_codes(b, words, sums, BITS, SHIFT + 8)
    sums = times_codes(c, words, sums, BITS, SHIFT + 16)
    return times_codes(d, words, sums, BITS, SHIFT + 24)


@triton.jit
def run_sums(
    x: tl.tensor,  # [PIECES, 1] *inputs
    mask: tl.tensor,  # [PIECES, 1]
    held: tl.tuple,  # of blocks
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    RUN: tl.constexpr,
):  # [PIECES, 16] float32 for each block, and [PIECES, 1] float32
    """For RUN codes of a piece from FIRST on, the sum of x times codes in units of 2^-53, and that of x."""
    WORD: tl.constexpr = 16 if BITS == 3 else 32 // BITS  # codes
    sums = zeros_of(held)
    all_x = tl.zeros(mask.shape, tl.float32)
    for word in tl.static_range(FIRST // WORD, (FIRST + RUN) // WORD):
        for quad in tl.static_range(WORD // 4):
            a, b, c, d = four_inputs(x + word * WORD + quad * 4, mask)
            all_x += (a + b) + (c + d)
            added = ()
            for n in tl.static_range(len(held)):
                low, high = held[n][0], held[n][1]
                if BITS == 3:
                    words = with_high(low[word], high[word // 2] >> word % 2 * 4, quad % 2)
                    sum = four_codes(a, b, c, d, words, sums[n], 3, quad // 2 * 4)
                else:
                    sum = four_codes(a, b, c, d, low[word], sums[n], BITS, quad * BITS)
                added = with_last(added, sum)
            sums = added
    return sums, all_x


@triton.jit
def zeros_of(held: tl.tuple):
    """A tuple of zeros float32 [PIECES, 16], one for each block."""
    zeros = ()
    for n in tl.static_range(len(held)):
        zeros = with_last(zeros, tl.zeros(held[n][0][0].shape, tl.float32))
    return zeros


@triton.jit
def plain_rows(
    x: tl.tensor,  # [K]
    weights: tl.tensor,  # [N, K], in x's dtype
    first: tl.tensor,  # the first row
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # [ROWS] float32
    """ROWS rows from `first` on of a matrix that is not quantized, times x, COLUMNS inputs at a time."""
    n = first + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        there = i < K
        w = tl.load(weights + n[:, None] * K + i[None, :], mask=there[None, :], other=0.0).to(tl.float32)
        values = tl.load(x + i, mask=there, other=0.0).to(tl.float32)
        total = tl.fma(w, values[None, :], total)
    return tl.sum(total, axis=1)


@triton.jit
def held_from(
    matrix: tl.tensor,  # *uint8
    blocks: tl.tuple,
    piece: tl.tensor,  # [PIECES]
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    PIECE: tl.constexpr,
):
    """What `pieces_from` gives for each block, as tensors [PIECES, 16]."""
    p, r = piece[:, None], tl.arange(0, 16)[None, :]
    held = ()
    for n in tl.static_range(len(blocks)):
        pieces = pieces_from(matrix, blocks[n], p, r, N, K, BITS, GROUP, META, PIECE)
        held = with_last(held, pieces)
    return held


@triton.jit
def held_times(
    x: tl.tensor,  # [PIECES, 1] *inputs
    mask: tl.tensor,  # [PIECES, 1]
    held: tl.tuple,  # of blocks
    totals: tl.tuple,  # of blocks, [PIECES, 16] float32 each
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The totals with the products of x and what `held_from` gave added to them."""
    RUN: tl.constexpr = min(GROUP, PIECE)  # codes with one scale
    SAME: tl.constexpr = min(GROUP * META, PIECE)  # and with one step
    for same in tl.static_range(PIECE // SAME):
        parts = zeros_of(held)
        for run in tl.static_range(same * SAME // RUN, (same + 1) * SAME // RUN):
            sums, all_x = run_sums(x, mask, held, BITS, run * RUN, RUN)
            all_x *= -(2.0 ** (BITS - 8 - 53))
            added = ()
            for n in tl.static_range(len(held)):
                scale, zero = held[n][2][run].to(tl.float32), held[n][3][run].to(tl.float32)
                part = tl.fma(scale, tl.fma(zero, all_x, sums[n]), parts[n])
                added = with_last(added, part)
            parts = added
        added = ()
        for n in tl.static_range(len(held)):
            total = tl.fma(held[n][4][same] * 2.0**53, parts[n], totals[n])
            added = with_last(added, total)
        totals = added
    return totals


@triton.jit
def packed_blocks(
    x: tl.tensor,  # [K]
    matrix: tl.tensor,  # *uint8
    blocks: tl.tuple,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):  # [16] float32 for each block
    """Some blocks of a quantized matrix, times x, PIECES pieces of PIECE codes at a time."""
    ALL: tl.constexpr = K // PIECE
    piece = tl.arange(0, PIECES)
    # All that a program loads of a round, or of the next one, is under way before it computes. Without the
    # barriers the compiler saves registers, and moves each load down to where its result is needed.
    held = held_from(matrix, blocks, piece, N, K, BITS, GROUP, META, PIECE)
    totals = zeros_of(held)
    p = piece[:, None]
    if ALL <= PIECES:
        tl.debug_barrier()
        totals = held_times(x + p * PIECE, p < ALL, held, totals, BITS, GROUP, META, PIECE)
    else:
        for start in range(0, ALL, PIECES):
            p = start + piece[:, None]
            following = held_from(matrix, blocks, start + PIECES + piece, N, K, BITS, GROUP, META, PIECE)
            tl.debug_barrier()
            totals = held_times(x + p * PIECE, p < ALL, held, totals, BITS, GROUP, META, PIECE)
            held = following
    sums = ()
    for n in tl.static_range(len(blocks)):
        sums = with_last(sums, tl.sum(totals[n], axis=0))
    return sums


@triton.jit
def dot_rows(
    x: tl.tensor,  # [K]
    matrix: tl.tensor,  # *uint8
    first: tl.tensor,  # the first row
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):  # [ROWS] float32
    """ROWS rows from `first` on of a matrix, times x, PIECES pieces at a time. Of a quantized matrix they are
    one or two blocks.

    At 16 bits a piece is one weight in x's dtype, which may be float32.
    """
    if BITS == 16:
        weights = matrix.to(tl.pointer_type(x.dtype.element_ty), bitcast=True)
        sums = plain_rows(x, weights, first, K, ROWS, PIECES)
    else:
        block = first // 16
        if ROWS == 16:
            (sums,) = packed_blocks(x, matrix, (block,), N, K, BITS, GROUP, META, PIECE, PIECES)
        else:
            blocks = (block, block + 1)
            upper, lower = packed_blocks(x, matrix, blocks, N, K, BITS, GROUP, META, PIECE, PIECES)
            sums = tl.trans(tl.join(upper, lower)).reshape(32)
    return sums
