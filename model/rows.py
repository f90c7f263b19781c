"""Products of many rows at few different row counts, on a CPU in 16 bits.

oneDNN compiles a kernel for every number of rows that a 16-bit product is asked for, and keeps a thousand of
them: 0.65 MiB each, measured, so 650 MiB. Prompts have any length, and routing gives an expert any number of
rows. So rows are computed in pieces of 256, and the last piece is filled up with zeros to one of ten counts.
Up to 64 rows that is almost free, since the weights' way from memory takes longer than the arithmetic.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 256  # rows: with more, a product is no faster
COUNTS = (1, 16, 32, 48, 64, 96, 128, 160, 192, 224, PIECE)


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
    if x.dtype.itemsize != 2 or x.device.type != "cpu":
        return product(x)
    rows = x.reshape(-1, x.shape[-1])
    M = rows.shape[0]
    if M == 0 or M in COUNTS:
        out = product(rows)
    else:
        filled = F.pad(rows, (0, 0, 0, rows_filled_up(M) - M))
        pieces = [product(piece) for piece in filled.split(PIECE)]
        out = (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:M]
    return out.view(*x.shape[:-1], out.shape[-1])


def rows_filled_up(M: int) -> int:
    """How many rows are computed for M of them.

    >>> [rows_filled_up(M) for M in (0, 1, 2, 100, 256, 257, 300, 512)]
    [0, 1, 16, 128, 256, 257, 304, 512]
    """
    whole, rest = divmod(M, PIECE)
    return whole * PIECE + next((count for count in COUNTS if count >= rest), PIECE) * (rest > 0)
