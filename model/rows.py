"""Products of many rows, computed with only a few different row counts, on a CPU in 16 bits.

oneDNN compiles a kernel for every row count that a 16-bit product is asked for. It keeps a thousand of them,
at a measured 0.65 MiB each. Prompts can have any length, and routing can give an expert any number of rows.
So rows are computed in pieces of 256, and the last piece is padded with zeros to the next of the counts
below. Padding a few rows costs little, because reading the weights takes longer than the arithmetic. From 64
rows on it adds about a quarter to the arithmetic at most.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 256  # rows; a product with more is no faster
KERNEL_BYTES = 665 << 10  # measured: what oneDNN keeps for one row count and one matrix shape
COUNTS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, PIECE)


def in_pieces(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`product(x)`, for a product that computes each row of x [..., K] by itself.

    On a CPU in 16 bits, the M of `product` [M, K] -> [M, N] is always one of `COUNTS`. Otherwise `product`
    takes all rows at once.

    >>> counts = []
    >>> x = torch.ones(3, 100, 4, dtype=torch.bfloat16)
    >>> rows = in_pieces(lambda x: counts.append(len(x)) or 2 * x, x)
    >>> counts, rows.shape, bool((rows == 2).all())
    ([256, 48], torch.Size([3, 100, 4]), True)
    """
    if x.numel() == x.shape[-1] or not compiles(x.dtype, x.device):
        return product(x)
    rows = x.reshape(-1, x.shape[-1])
    M = rows.shape[0]
    if M == 0 or M in COUNTS:
        out = product(rows)
    else:
        *whole, last = rows.split(PIECE)
        pieces = [product(piece) for piece in (*whole, filled_up(last))]
        out = (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:M]
    return out.view(*x.shape[:-1], out.shape[-1])


def apart(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # [N, K] -> [N, M]
    """`product(x)` for rows of N different texts. On a CPU, each row gets the bits that it gets alone.

    A product that promises this for any rows says so by an attribute `independent`, and takes all rows at
    once. Another one may round differently if it gets more rows, so it takes one row at a time. A GPU takes
    all rows at once, without the promise: one row after the other would read the weights N times.
    """
    if len(x) == 1 or x.is_cuda or getattr(product, "independent", False):
        return product(x)
    return torch.cat([product(row) for row in x.split(1)])


def filled_up(rows: Tensor) -> Tensor:  # [M, K] -> [M or more, K]
    """Rows padded with zeros as `in_pieces` pads them. Several products of the same rows need this once."""
    missing = rows_filled_up(len(rows)) - len(rows) if compiles(rows.dtype, rows.device) else 0
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def compiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether such a product has a kernel compiled for every row count."""
    return dtype.itemsize == 2 and device.type == "cpu"


def kernel_bytes(matrices: int, dtype: torch.dtype, device: torch.device) -> int:
    """The bytes of all kernels, if matrices of that many shapes are multiplied at all counts."""
    return matrices * len(COUNTS) * KERNEL_BYTES if compiles(dtype, device) else 0


def rows_filled_up(M: int) -> int:
    """The number of rows that are computed for M rows.

    >>> [rows_filled_up(M) for M in (0, 1, 2, 100, 256, 257, 300, 512)]
    [0, 1, 4, 128, 256, 257, 304, 512]
    """
    whole, rest = divmod(M, PIECE)
    return whole * PIECE + next((count for count in COUNTS if count >= rest), PIECE) * (rest > 0)
