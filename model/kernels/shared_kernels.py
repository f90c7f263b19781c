"""What the kernels of matrices and of experts share: rounding, and loading what is stored of a matrix.

A matrix is one pointer, because its streams follow one another as in `model.quant.streams`. Its rows are
interleaved by 16, so kernels count blocks of 16 rows, and a tensor's last dimension is the rows of a block.

A *piece* is some consecutive codes of each row of a block. A thread has 4 of the rows, whose words are loads
of 16 bytes.

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
def with_last(items, item):
    """A tuple that is longer by one."""
    return items + (item,)  # noqa: RUF005


@triton.jit
def tiles(first: tl.tensor, mask: tl.tensor, COUNT: tl.constexpr):
    """A tuple of what lies where `first` points to, 16 numbers after that, and so on."""
    loaded = ()
    for i in tl.static_range(COUNT):
        loaded = with_last(loaded, tl.load(first + i * 16, mask=mask, other=0))
    return loaded


@triton.jit
def pieces_from(
    matrix: tl.tensor,  # *uint8
    block: tl.tensor,
    p: tl.tensor,  # the piece
    r: tl.tensor,  # 0 to 15, the row of a block
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    META: tl.constexpr,
    PIECE: tl.constexpr,
):
    """All that is stored of some pieces, as tuples of tensors in the common shape of block, p and r: words,
    words of high bits, scales, zeros and steps. They are zeros from the end of a row on."""
    J: tl.constexpr = K // GROUP
    STEPS: tl.constexpr = (J + META - 1) // META
    WORD: tl.constexpr = 16 if BITS == 3 else 32 // BITS  # codes
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
def with_high(low: tl.tensor, high: tl.tensor, ODD: tl.constexpr):  # int32
    """Half of the codes of a low word, those for which i // 4 is ODD or not, with their high bits: code i in
    byte i % 4 from bit i // 8 * 4 on.

    The high bits are those in the lower halves of the bytes of `high`.
    """
    if ODD:
        codes = ((low >> 2) & 0x33333333) | ((high << 1) & 0x04040404) | ((high << 3) & 0x40404040)
    else:
        codes = (low & 0x33333333) | ((high << 2) & 0x04040404) | ((high << 4) & 0x40404040)
    return codes
