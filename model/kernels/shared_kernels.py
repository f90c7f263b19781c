"""What the kernels of matrices and of experts share: rounding, scales and zeros, and the dot products of some
rows of a matrix with one x.

A matrix is one pointer, because its streams follow one another as in `model.quant.streams`.

**One row of x** is bound by memory. Its kernels read every byte of a matrix once, and sum up in float32.
Where groups are long enough, a thread loads 16 consecutive bytes. A byte holds codes that lie a part of a
group apart along K, so x is read once for each part. The bits of a code stay where they are in the byte.
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
def scales_and_zeros(
    matrix: tl.tensor,  # *uint8
    n: tl.tensor,  # [ROWS] rows of the matrix
    j: tl.tensor,  # [GROUPS] groups of a row
    there: tl.tensor,  # [GROUPS] whether the row has them
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
):  # [ROWS, GROUPS] float32 each
    J: tl.constexpr = K // GROUP
    SCALES: tl.constexpr = N * K * BITS // 8
    at = n[:, None] * J + j[None, :]
    mask = there[None, :]
    scale = tl.load(matrix + SCALES + at, mask=mask, other=0).to(tl.float32)
    zero = tl.load(matrix + SCALES + N * J + at, mask=mask, other=0).to(tl.float32)
    steps = (matrix + SCALES + 2 * N * J).to(tl.pointer_type(tl.float32), bitcast=True)
    step = tl.load(steps + at // META, mask=mask, other=0.0)
    return scale * step, zero * (1.0 / (1 << (8 - BITS)))


@triton.jit
def times_codes(
    x: tl.tensor,  # [WIDE]
    packed: tl.tensor,  # [ROWS, WIDE] int32
    sums: tl.tensor,  # [ROWS, WIDE] float32
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # [ROWS, WIDE] float32
    """Add x times the codes, which are the BITS bits from SHIFT on.

    As a float32 they are a denormal number, 2^-149 times the integer. A GPU multiplies it exactly and at full
    speed. x may be up to 2^32, and keeps all its bits down to 2^-70.
    """
    number = (packed & (((1 << BITS) - 1) << SHIFT)).to(tl.float32, bitcast=True)
    return tl.fma(number, (x * (2.0**96 / (1 << SHIFT)))[None, :], sums)


@triton.jit
def with_high(
    low: tl.tensor,  # [ROWS, WIDE] int32
    high: tl.tensor,  # [ROWS, WIDE] int32
    SHIFT: tl.constexpr,
    BY: tl.constexpr,
):  # [ROWS, WIDE] int32
    """Put the codes of 3 bits together that are at SHIFT and 4 bits after it."""
    LOW: tl.constexpr = 0x33 << (SHIFT % 4)
    return (low & LOW) | ((high << BY) & ~LOW)


@triton.jit
def code_sums(
    x: tl.tensor,  # [K]
    codes: tl.tensor,  # [N, K * BITS / 8] *uint8; at 3 bits the low plane, then the high plane
    n: tl.tensor,  # [ROWS]
    start: tl.tensor,  # the first group
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # [ROWS, GROUPS] and [GROUPS] float32
    """For GROUPS groups from `start` on, the sum of x times codes, and the sum of x.

    Tensors have two dimensions until groups are added up. With three, some compilers spread the rows so that
    no thread has two of them.
    """
    PARTS: tl.constexpr = 8 if BITS == 3 else 8 // BITS  # at 3 bits those of the high plane
    BYTES: tl.constexpr = GROUP // PARTS
    UNIT: tl.constexpr = min(BYTES, 8 if BITS < 4 else 16)
    wide = tl.arange(0, GROUPS * BYTES)
    unit = wide // UNIT
    j, byte = start + unit // (BYTES // UNIT), unit % (BYTES // UNIT) * UNIT + wide % UNIT
    there = j < K // GROUP
    if BITS == 3:
        at = n[:, None] * (K // 4) + (j * (2 * BYTES) + byte)[None, :]
        even = tl.load(codes + at, mask=there[None, :], other=0).to(tl.int32)
        odd = tl.load(codes + at + BYTES, mask=there[None, :], other=0).to(tl.int32)
        at = n[:, None] * (K // 8) + (j * BYTES + byte)[None, :]
        high = tl.load(codes + N * K // 4 + at, mask=there[None, :], other=0).to(tl.int32)
    else:
        at = n[:, None] * (K // PARTS) + (j * BYTES + byte)[None, :]
        packed = tl.load(codes + at, mask=there[None, :], other=0).to(tl.int32)
    sums = tl.zeros([ROWS, GROUPS * BYTES], tl.float32)
    inputs = tl.zeros([GROUPS * BYTES], tl.float32)
    for part in tl.static_range(PARTS):
        values = tl.load(x + j * GROUP + part * BYTES + byte, mask=there, other=0.0).to(tl.float32)
        inputs += values
        if BITS == 3:
            packed = with_high(even if part % 2 == 0 else odd, high, part // 2 * 2, 2 - part % 2)
            sums = times_codes(values, packed, sums, 3, part // 2 * 2)
        else:
            sums = times_codes(values, packed, sums, BITS, part * BITS)
    sums = tl.sum(sums.reshape(ROWS, GROUPS, BYTES), axis=2) * 2.0**53
    return sums, tl.sum(inputs.reshape(GROUPS, BYTES), axis=1)


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
def packed_rows(
    x: tl.tensor,  # [K]
    matrix: tl.tensor,  # *uint8
    first: tl.tensor,  # the first row
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # [ROWS] float32
    """ROWS rows from `first` on of a quantized matrix, times x, GROUPS groups at a time."""
    J: tl.constexpr = K // GROUP
    n = first + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, GROUPS], tl.float32)
    for start in range(0, J, GROUPS):
        j = start + tl.arange(0, GROUPS)
        scale, zero = scales_and_zeros(matrix, n, j, j < J, N, K, BITS, GROUP, META)
        sums, all_x = code_sums(x, matrix, n, start, N, K, BITS, GROUP, ROWS, GROUPS)
        total = tl.fma(scale, tl.fma(-zero, all_x[None, :], sums), total)
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
    GROUPS: tl.constexpr,
):  # [ROWS] float32
    """ROWS rows from `first` on of a matrix, times x, GROUPS groups at a time.

    At 16 bits a group is one weight in x's dtype, which may be float32.
    """
    if BITS == 16:
        weights = matrix.to(tl.pointer_type(x.dtype.element_ty), bitcast=True)
        sums = plain_rows(x, weights, first, K, ROWS, GROUPS)
    else:
        sums = packed_rows(x, matrix, first, N, K, BITS, GROUP, META, ROWS, GROUPS)
    return sums
