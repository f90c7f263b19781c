"""What the kernels of matrices and of experts share: rounding, scales and zeros, and the dot products of some
rows of a matrix with one x.

A matrix is one pointer, because its streams follow one another as in `model.quant.streams`. Its rows are
interleaved by 16, so kernels count blocks of 16 rows, and a tensor's last dimension is the rows of a block.

**One row of x** is bound by memory. Its kernels read every byte of a matrix once, and sum up in float32. A
thread loads 16 bytes, the words of 4 rows, and goes along K through a *piece* of them. So it sums up a group,
or a good part of one, without asking other threads. The bits of a code stay where they are in the word.
Instead x is made smaller in proportion, by a power of two, which is exact. Codes are not converted to numbers
either, because the bits of a small integer are those of a denormal float32. Scale and zero come in once for a
group, since the sum of (q - z) s x is s (sum of q x - z sum of x).

**The order of a sum** is fixed: programs never add to the same number. `launch` forbids contraction, so a
product and a sum round one by one. `tl.fma` stands where one rounding is wanted.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(values: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr):  # float32 -> dtype
    """Round to the nearest, ties to even.

    Triton's interpreter cuts off the bits that bfloat16 has no room for. So the value is rounded here, until
    those bits are 0.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def tiles(first: tl.tensor, mask: tl.tensor, COUNT: tl.constexpr):
    """A tuple of what lies where `first` [BLOCKS, PIECES, 16] points to, 16 numbers after that, and so on.

    Triton gives threads elements by how many of them it takes to be contiguous. 4 rows are a load of words. A
    load of bytes shall not give a thread more. Pieces are not contiguous, but that puts them before blocks: so
    threads get other pieces, and one thread all blocks of its piece, for which it prepares x once.
    """
    loaded = ()
    for i in tl.static_range(COUNT):
        at = tl.max_contiguous(first + i * 16, [1, 2, 4])
        loaded = loaded + (tl.load(at, mask=mask, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return loaded


@triton.jit
def with_high(low: tl.tensor, high: tl.tensor):  # int32 -> int32, twice
    """Codes of 3 bits, with a bit between any two: code i of a low word is in byte i % 4, in the first
    result if i // 4 is 0 or 2, in the second if it is 1 or 3, from bit i // 8 * 4 on.

    The high bits are those in the lower halves of the bytes of `high`.
    """
    even = (low & 0x33333333) | ((high << 2) & 0x04040404) | ((high << 4) & 0x40404040)
    odd = ((low >> 2) & 0x33333333) | ((high << 1) & 0x04040404) | ((high << 3) & 0x40404040)
    return even, odd


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
    x: tl.tensor,  # [1, PIECES, 1] *inputs
    mask: tl.tensor,  # [1, PIECES, 1]
    low: tl.tuple,  # of words, [BLOCKS, PIECES, 16] int32 each
    high: tl.tuple,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    RUN: tl.constexpr,
):  # [BLOCKS, PIECES, 16] and [1, PIECES, 1] float32
    """For RUN codes of a piece from FIRST on, the sum of x times codes in units of 2^-53, and that of x."""
    CODES: tl.constexpr = 16 if BITS == 3 else 32 // BITS  # of a word
    sums = tl.zeros(low[0].shape, tl.float32)
    all_x = tl.zeros(mask.shape, tl.float32)
    for word in tl.static_range(FIRST // CODES, (FIRST + RUN) // CODES):
        if BITS == 3:
            even, odd = with_high(low[word], high[word // 2] >> word % 2 * 4)
        for quad in tl.static_range(CODES // 4):
            a, b, c, d = four_inputs(x + word * CODES + quad * 4, mask)
            all_x += (a + b) + (c + d)
            if BITS == 3:
                sums = four_codes(a, b, c, d, even if quad % 2 == 0 else odd, sums, 3, quad // 2 * 4)
            else:
                sums = four_codes(a, b, c, d, low[word], sums, BITS, quad * BITS)
    return sums, all_x


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
def pieces_from(
    matrix: tl.tensor,  # *uint8
    blocks: tl.tensor,  # [BLOCKS]
    piece: tl.tensor,  # [PIECES]
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    PIECE: tl.constexpr,
):
    """All that is stored of some pieces, as tuples of tensors [BLOCKS, PIECES, 16]: words, words of high
    bits, scales, zeros and steps. They are zeros from the end of a row on."""
    J: tl.constexpr = K // GROUP
    STEPS: tl.constexpr = (J + META - 1) // META
    WORD: tl.constexpr = 16 if BITS == 3 else 32 // BITS  # codes
    block, p, r = blocks[:, None, None], piece[None, :, None], tl.arange(0, 16)[None, None, :]
    mask = p < K // PIECE
    codes = matrix.to(tl.pointer_type(tl.int32), bitcast=True)
    low = tiles(codes + (block * (K // WORD) + p * (PIECE // WORD)) * 16 + r, mask, PIECE // WORD)
    high = ()
    if BITS == 3:
        at = codes + N * K // 16 + (block * (K // 32) + p * (PIECE // 32)) * 16 + r
        high = tiles(at, mask, PIECE // 32)
    scales = matrix + N * K * BITS // 8
    at = scales + (block * J + p * PIECE // GROUP) * 16 + r
    scale = tiles(at, mask, (PIECE + GROUP - 1) // GROUP)
    zero = tiles(at + N * J, mask, (PIECE + GROUP - 1) // GROUP)
    steps = (scales + 2 * N * J).to(tl.pointer_type(tl.float32), bitcast=True)
    at = steps + (block * STEPS + p * PIECE // (GROUP * META)) * 16 + r
    step = tiles(at, mask, (PIECE + GROUP * META - 1) // (GROUP * META))
    return low, high, scale, zero, step


@triton.jit
def pieces_times(
    x: tl.tensor,  # [PIECES] *inputs
    mask: tl.tensor,  # [PIECES]
    pieces: tl.tuple,
    total: tl.tensor,  # [BLOCKS, PIECES, 16] float32
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    PIECE: tl.constexpr,
):  # [BLOCKS, PIECES, 16] float32
    """Add the products of x with what `pieces_from` returned."""
    low, high, scale, zero, step = pieces
    RUN: tl.constexpr = min(GROUP, PIECE)  # codes with one scale
    SAME: tl.constexpr = min(GROUP * META, PIECE)  # and with one step
    for same in tl.static_range(PIECE // SAME):
        part = tl.zeros(total.shape, tl.float32)
        for run in tl.static_range(same * SAME // RUN, (same + 1) * SAME // RUN):
            sums, all_x = run_sums(x[None, :, None], mask[None, :, None], low, high, BITS, run * RUN, RUN)
            sums = tl.fma(zero[run].to(tl.float32), all_x * -(2.0 ** (BITS - 8 - 53)), sums)
            part = tl.fma(scale[run].to(tl.float32), sums, part)
        total = tl.fma(step[same] * 2.0**53, part, total)
    return total


@triton.jit
def packed_blocks(
    x: tl.tensor,  # [K]
    matrix: tl.tensor,  # *uint8
    blocks: tl.tensor,  # [BLOCKS]
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):  # [BLOCKS, 16] float32
    """Some blocks of a quantized matrix, times x, PIECES pieces of PIECE codes at a time."""
    ALL: tl.constexpr = K // PIECE
    piece = tl.arange(0, PIECES)
    total = tl.zeros([blocks.shape[0], PIECES, 16], tl.float32)
    # All that a program loads of a round, or of the next one, is under way before it computes. Without the
    # barriers the compiler saves registers, and moves each load down to where its result is needed.
    held = pieces_from(matrix, blocks, piece, N, K, BITS, GROUP, META, PIECE)
    if ALL <= PIECES:
        tl.debug_barrier()
        total = pieces_times(x + piece * PIECE, piece < ALL, held, total, BITS, GROUP, META, PIECE)
    else:
        for start in range(0, ALL, PIECES):
            piece = start + tl.arange(0, PIECES)
            following = pieces_from(matrix, blocks, piece + PIECES, N, K, BITS, GROUP, META, PIECE)
            tl.debug_barrier()
            total = pieces_times(x + piece * PIECE, piece < ALL, held, total, BITS, GROUP, META, PIECE)
            held = following
    return tl.sum(total, axis=1)


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
    """ROWS rows from `first` on of a matrix, times x, PIECES pieces at a time. If it is quantized, both are
    multiples of 16.

    At 16 bits a piece is one weight in x's dtype, which may be float32.
    """
    if BITS == 16:
        weights = matrix.to(tl.pointer_type(x.dtype.element_ty), bitcast=True)
        sums = plain_rows(x, weights, first, K, ROWS, PIECES)
    else:
        blocks = first // 16 + tl.arange(0, ROWS // 16)
        sums = packed_blocks(x, matrix, blocks, N, K, BITS, GROUP, META, PIECE, PIECES).reshape(ROWS)
    return sums
