"""What goes from rank to rank: a header of whole numbers, and rows. A frame is one message of bytes.

count, dtype, rows, width   int64 each; dtype is an index into DTYPES, and -1 stands for no rows
header                      int64, `count` of them
rows                        [rows, width], if they fit; otherwise they are a message of their own
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
FIXED = 4  # numbers before the header
WORD = 8  # bytes


@dataclass(frozen=True)
class Shape:
    """The rows that a frame announces."""

    rows: int
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize


def frame_bytes(rows: int, width: int, dtype: torch.dtype, header: int) -> int:
    """The bytes of a frame that holds [rows, width] and a header of that many numbers."""
    return Shape(rows, width, dtype).bytes + WORD * (FIXED + header)


def write(frame: torch.Tensor, header: Sequence[int], rows: torch.Tensor | None) -> tuple[int, bool]:
    """Put a header and rows into `frame` (uint8, on the host). Returns the bytes used, and whether the rows
    are among them.

    Raises `ValueError` for rows that are no matrix of a dtype in `DTYPES`, or a header longer than the frame.
    """
    end = WORD * (FIXED + len(header))
    if end > len(frame):
        raise ValueError(f"a header of {len(header)} numbers does not fit a frame of {len(frame)} bytes")
    if rows is None:
        struct.pack_into(f"={FIXED + len(header)}q", frame.numpy().data, 0, len(header), -1, 0, 0, *header)
        return end, True
    if rows.dim() != 2 or rows.dtype not in DTYPES:
        raise ValueError(f"rows of shape {list(rows.shape)} and {rows.dtype} are no frame's")
    numbers = len(header), DTYPES.index(rows.dtype), rows.shape[0], rows.shape[1]
    struct.pack_into(f"={FIXED + len(header)}q", frame.numpy().data, 0, *numbers, *header)
    size = rows.numel() * rows.itemsize
    if end + size > len(frame):
        return end, False
    frame[end : end + size].view(rows.dtype).view(rows.shape).copy_(rows)
    return end + size, True


def read(frame: torch.Tensor) -> tuple[list[int], Shape | None, torch.Tensor | None]:
    """The header of a frame, the shape of its rows, and a view of them if they are in it."""
    count, code, rows, width = struct.unpack_from(f"={FIXED}q", frame.numpy().data, 0)
    header = list(struct.unpack_from(f"={count}q", frame.numpy().data, WORD * FIXED))
    if code < 0:
        return header, None, None
    shape, start = Shape(rows, width, DTYPES[code]), WORD * (FIXED + count)
    if start + shape.bytes > len(frame):
        return header, shape, None
    return header, shape, frame[start : start + shape.bytes].view(shape.dtype).view(rows, width)
