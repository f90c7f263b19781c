"""What the kernels of attention do with keys and values in 8 bits, as `model.kv_codes` does it."""

import triton
import triton.language as tl

from model.kernels.shared_kernels import rounded


@triton.jit
def store_codes(
    values: tl.tensor,  # [K] float32
    codes: tl.tensor,  # [K] int8
    scale: tl.tensor,  # [1] float32
    i: tl.tensor,  # 0 to K - 1
) -> None:
    """What `model.kv_codes.encode` makes of K numbers, bit for bit."""
    largest = tl.max(tl.abs(values), axis=0) + tl.sum(values * 0.0, axis=0)  # NaN if a number is not finite
    step = tl.div_rn(largest, 127.0)
    step = tl.where(step < 1.1754943508222875e-38, 1.1754943508222875e-38, step)
    code = tl.div_rn(values, step)
    code = (code + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
    tl.store(codes + i, tl.where(code == code, code, 0.0).to(tl.int8))
    tl.store(scale, step)


@triton.jit
def load_rows(
    rows: tl.tensor,  # [C, K]
    scales: tl.tensor,  # [C] float32, if CODED
    row: tl.tensor,  # [TILE]
    d: tl.tensor,  # 0 to K - 1
    there: tl.tensor,  # [TILE]
    K: tl.constexpr,
    dtype: tl.constexpr,
    CODED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # [TILE, K]
    """Some tokens' keys or values, zeros where they are not there. Codes become the numbers that
    `model.kv_codes.decode` makes of them."""
    x = tl.load(rows + row[:, None] * K + d[None, :], mask=there[:, None], other=0)
    if CODED:
        scale = tl.load(scales + row, mask=there, other=0.0)
        x = rounded(x.to(tl.float32) * scale[:, None], dtype, INTERPRETED)
    return x
