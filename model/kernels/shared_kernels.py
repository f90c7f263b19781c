"""What the kernels of matrices and of experts share: rounding, scales and zeros, and rows of a matrix times
one x.

A matrix is one pointer: its streams follow one another as in `model.quant.streams`.

One row of x is bound by memory. Its kernels read every byte of a matrix once, where groups are long enough 16
consecutive bytes to a thread, and sum up in float32. A byte holds codes that lie a part of a group apart
along K, so x is read once for each part. The bits of a code stay where they are in the byte, and x is made
smaller in proportion: by powers of two, so exactly. Codes are not converted either: the bits of a small
integer are those of a denormal float32. Scale and zero come in once for a group, since the sum of
(q - z) s x is s (sum of q x - z sum of x).

Programs never share a sum, whose order would be left to chance. Products and sums that have to round one by
one do, since `launch` forbids contraction. Where one rounding is wanted, `tl.fma` says so.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(values: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr):  # float32 -> dtype
    """To the nearest, ties to even. Triton's interpreter would cut off what bfloat16 has no room for, so here
    the bits to be cut are first made 0."""
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
    there: tl.tensor,  # [GROUPS] whether they exist
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
):  # sums and more, [ROWS, WIDE] float32
    """x times the BITS bits from SHIFT on, which are read where they are, as a float32: a denormal number,
    2^-149 times the integer. So nothing is converted, and multiplying is exact and as fast as ever. x may be
    up to 2^32, and keeps all its bits down to 2^-70."""
    number = (packed & (((1 << BITS) - 1) << SHIFT)).to(tl.float32, bitcast=True)
    return tl.fma(number, (x * (2.0**96 / (1 << SHIFT)))[None, :], sums)


@triton.jit
def with_high(
    low: tl.tensor,  # [ROWS, WIDE] int32
    high: tl.tensor,  # [ROWS, WIDE] int32
    SHIFT: tl.constexpr,
    BY: tl.constexpr,
):  # [ROWS, WIDE] int32
    """Codes of 3 bits, at SHIFT and at 4 bits from there."""
    LOW: tl.constexpr = 0x33 << (SHIFT % 4)
    return (low & LOW) | ((high << BY) & ~LOW)


@triton.jit
def code_sums(
    x: tl.tensor,  # [K]
    codes: tl.tensor,  # [N, K * BITS / 8] *uint8; at 3 bits the low plane, and the high plane behind it
    n: tl.tensor,  # [ROWS]
    start: tl.tensor,  # group
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # [ROWS, GROUPS] and [GROUPS] float32
    """Sums of x times codes, group by group from `start` on, and sums of x.

    Tensors have two dimensions until groups are added up: of three, compilers would choose which threads
    have which rows, and some choose so that none has two."""
    PARTS: tl.constexpr = 8 if BITS == 3 else 8 // BITS  # 3 bits: those of the high plane
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
    first: tl.tensor,  # row
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # [ROWS] float32
    """ROWS rows of a matrix that is not quantized, from `first` on, times x, COLUMNS inputs at a time."""
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
    first: tl.tensor,  # row
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # [ROWS] float32
    """ROWS rows of the matrix, from `first` on, times x, GROUPS groups at a time."""
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
    first: tl.tensor,  # row
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # [ROWS] float32
    """ROWS rows of the matrix, from `first` on, times x, GROUPS groups at a time. At 16 bits a group is one
    weight, in x's dtype, which may be float32."""
    if BITS == 16:
        weights = matrix.to(tl.pointer_type(x.dtype.element_ty), bitcast=True)
        sums = plain_rows(x, weights, first, K, ROWS, GROUPS)
    else:
        sums = packed_rows(x, matrix, first, N, K, BITS, GROUP, META, ROWS, GROUPS)
    return sums
