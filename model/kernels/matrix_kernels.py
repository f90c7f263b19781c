"""The kernels behind `fused.py`: weights go from packed bytes to sums inside a GPU's registers.

One token is bound by memory. Its kernels read every byte of a matrix once, 16 consecutive bytes to a thread
where groups are long enough, and make a dot product of it in float32. A byte holds codes that lie a part of a
group apart along K, so x is read once for each part, and the bits of a code are multiplied where they are in
the byte, by an x that is smaller in proportion: powers of two, so exactly. Codes are not even converted: the
bits of a small integer are, as they are, those of a denormal float32. Scale and zero come in once for a
group, since the sum of (q - z) s x is s (sum of q x - z sum of x). Experts that are not quantized go through
the same launches, as dot products of numbers.

Up to 16 rows go to the tensor cores. There every weight is computed in float32 and rounded once to x's dtype,
so it is the number that `QuantizedTensor.dequantize` gives. The same is true where a matrix is expanded, for
more rows.

No sum is split between programs in an order that chance decides: the same input gives the same bits. Products
and sums that must round one by one do, since the launchers forbid contraction (`enable_fp_fusion=False`);
where one rounding is wanted, `tl.fma` says so.

A matrix is one pointer: its streams follow one another as in `model.quant.streams`.
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
    """PIECES pieces at a time, of a group's bytes PIECE each; 16 rows of x, those beyond M being zeros."""
    J: tl.constexpr = K // GROUP
    PARTS: tl.constexpr = 8 if BITS == 3 else 8 // BITS  # 3 bits: the parts of the high plane
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
                low_plane = even if part % 2 == 0 else odd  # whose parts are twice as long
                codes = ((low_plane >> (part // 2 * 2)) & 3) | (((packed >> part) & 1) << 2)
            else:
                codes = (packed >> (part * BITS)) & ((1 << BITS) - 1)
            w = rounded(
                (codes.to(tl.float32) - zero) * scale, x.dtype.element_ty, INTERPRETED
            )  # [ROWS, WIDE]
            inputs = m[:, None] * K + (group * GROUP + part * RUN + byte)[None, :]
            values = tl.load(x + inputs, mask=(m < M)[:, None] & there[None, :], other=0.0)
            if INTERPRETED:  # it would multiply bfloat16's bits; the numbers are the same in float32
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
    """The codes of one plane in the order of weights. So each byte is loaded once for every part, but from a
    cache after the first time, and whole lines are stored."""
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
    first: tl.tensor,  # row of the matrix
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [rows / ROWS, J / GROUPS, rounded up]
    """Rows of the matrix from `first` on, as numbers: those that `QuantizedTensor.dequantize` gives."""
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
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [F / ROWS, A]
    """`silu(w1 x) * w3 x`, every step rounded to h's dtype, as separate operations would."""
    dtype = h.dtype.element_ty
    first, choice = tl.program_id(0) * ROWS, tl.program_id(1)
    w13 = pool + tl.load(slots + choice).to(tl.int64) * BLOB
    gate = dot_rows(x, w13, first, 2 * F, D, BITS, GROUP, META, ROWS, GROUPS)
    gate = rounded(gate, dtype, INTERPRETED).to(tl.float32)
    up = dot_rows(x, w13, F + first, 2 * F, D, BITS, GROUP, META, ROWS, GROUPS)
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
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [D / ROWS]
    """The weighted sum of the experts' outputs, added in ascending order of id, every step rounded to y's
    dtype."""
    dtype = y.dtype.element_ty
    first = tl.program_id(0) * ROWS
    choices = tl.arange(0, CHOICES)
    known = tl.load(ids + choices, mask=choices < A, other=2147483647)
    rank = tl.sum((known[None, :] < known[:, None]).to(tl.int32), axis=1)  # [CHOICES]
    total = tl.zeros([ROWS], tl.float32)
    for place in range(A):
        choice = tl.sum(tl.where((rank == place) & (choices < A), choices, 0), axis=0)
        w2 = pool + tl.load(slots + choice).to(tl.int64) * BLOB + OFFSET
        part = dot_rows(h + choice * F, w2, first, D, F, BITS, GROUP, META, ROWS, GROUPS)
        part = rounded(part, dtype, INTERPRETED).to(tl.float32)
        weight = rounded(tl.load(weights + choice).to(tl.float32), dtype, INTERPRETED).to(tl.float32)
        part = rounded(part * weight, dtype, INTERPRETED).to(tl.float32)
        total = tl.where(place == 0, part, rounded(total + part, dtype, INTERPRETED).to(tl.float32))
    tl.store(y + first + tl.arange(0, ROWS), total.to(dtype))
