"""Products of many rows at few different row counts, on a CPU in 16 bits.

oneDNN compiles a kernel for every number of rows that a 16-bit product is asked for, and keeps a thousand of
them: 0.65 MiB each, measured, so 650 MiB. Prompts have any length, and routing gives an expert any number of
rows. So rows are computed in pieces of 256, and the last piece is filled up with zeros to the next of the
counts below. A few rows cost little more for that, since the weights' way from memory takes longer than the
arithmetic; from 64 rows on it is a quarter more arithmetic at most, but for a few numbers of rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 256  # rows: with more, a product is no faster
KERNEL_BYTES = 665 << 10  # that oneDNN keeps for a count of rows and a shape of matrix, measured
COUNTS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, PIECE)


def in_pieces(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`product(x)`, for a product that computes each row of x [..., K] by itself.

    Rows of a CPU's 16-bit tensors go through `product` [M, K] -> [M, N] with M one of `COUNTS` only. Of
    anything else, all rows go through it at once.

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


def filled_up(rows: Tensor) -> Tensor:  # [M, K] -> [M or more, K]
    """Rows as `in_pieces` computes them, with rows of zeros after them. Products that read the same rows many
    times need this once."""
    missing = rows_filled_up(len(rows)) - len(rows) if compiles(rows.dtype, rows.device) else 0
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def compiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel is compiled for every number of rows of such a product."""
    return dtype.itemsize == 2 and device.type == "cpu"


def kernel_bytes(matrices: int, dtype: torch.dtype, device: torch.device) -> int:
    """What kernels take when products with matrices of so many shapes have been asked for at all counts."""
    return matrices * len(COUNTS) * KERNEL_BYTES if compiles(dtype, device) else 0


def rows_filled_up(M: int) -> int:
    """How many rows are computed for M of them.

    >>> [rows_filled_up(M) for M in (0, 1, 2, 100, 256, 257, 300, 512)]
    [0, 1, 4, 128, 256, 257, 304, 512]
    """
    whole, rest = divmod(M, PIECE)
    return whole * PIECE + next((count for count in COUNTS if count >= rest), PIECE) * (rest > 0)
