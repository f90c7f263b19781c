"""What goes from rank to rank: a header of whole numbers, and rows. A frame is one message of bytes.

count, dtype, rows, width   int64 each; dtype is an index into DTYPES, and -1 stands for no rows
header                      int64, `count` of them
rows                        [rows, width], if they fit; otherwise they are a message of their own

APART is added to dtype if the rows come from GPU to GPU.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
FIXED = 4  # numbers before the header
APART = 1 << 8
WORD = 8  # bytes
PARTS = 64


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


class Frame:
    """Memory for one message.

    A hop takes as long as its calls, and those into PyTorch take microseconds. So rows are copied by address.
    """

    def __init__(self, size: int) -> None:
        """`size` in bytes."""
        self.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.memory, self.address = self.bytes.numpy().data, self.bytes.data_ptr()
        self.size = size
        self.parts = {size: self.bytes}  # beginnings of `bytes`, by length; few are in use

    def write(
        self, header: Sequence[int], rows: torch.Tensor | None, apart: bool = False
    ) -> tuple[torch.Tensor, bool]:
        """Put a header and rows [N, width] in. Returns the part of `bytes` that is to be sent, and whether
        no message is to follow: the rows are in it, or go `apart`.

        Raises `ValueError` for rows that are no matrix of a dtype in `DTYPES`, or a header longer than the
        frame.
        """
        count = len(header)
        end = WORD * (FIXED + count)
        if end > self.size:
            raise ValueError(f"a header of {count} numbers does not fit a frame of {self.size} bytes")
        if rows is None:
            struct.pack_into(f"={FIXED + count}q", self.memory, 0, count, -1, 0, 0, *header)
            return self.part(end), True
        if rows.dim() != 2 or rows.dtype not in DTYPES:
            raise ValueError(f"rows of shape {list(rows.shape)} and {rows.dtype} are no frame's")
        n, width = rows.shape
        numbers = count, DTYPES.index(rows.dtype) + (APART if apart else 0), n, width
        struct.pack_into(f"={FIXED + count}q", self.memory, 0, *numbers, *header)
        size = rows.numel() * rows.itemsize
        if apart or end + size > self.size:
            return self.part(end), apart
        rows = rows.contiguous() if rows.is_cpu else rows.to("cpu").contiguous()
        ctypes.memmove(self.address + end, rows.data_ptr(), size)
        return self.part(end + size), True

    def announced(self) -> Shape | None:
        """The rows that follow the frame as a message of their own; None if none do."""
        count, code, n, width = struct.unpack_from(f"={FIXED}q", self.memory, 0)
        if code < 0 or code >= APART:
            return None
        shape = Shape(n, width, DTYPES[code])
        return shape if WORD * (FIXED + count) + shape.bytes > self.size else None

    def read(self) -> tuple[list[int], torch.Tensor | Shape | None]:
        """The header, and a copy of the rows if they are in the frame, or their shape if they come apart."""
        count, code, n, width = struct.unpack_from(f"={FIXED}q", self.memory, 0)
        header = list(struct.unpack_from(f"={count}q", self.memory, WORD * FIXED))
        if code < 0:
            return header, None
        if code >= APART:
            return header, Shape(n, width, DTYPES[code - APART])
        shape, start = Shape(n, width, DTYPES[code]), WORD * (FIXED + count)
        if start + shape.bytes > self.size:
            return header, None
        rows = torch.empty(n, width, dtype=shape.dtype, device="cpu")
        ctypes.memmove(rows.data_ptr(), self.address + start, shape.bytes)
        return header, rows

    def part(self, end: int) -> torch.Tensor:
        """The first `end` bytes."""
        if (part := self.parts.get(end)) is None:
            if len(self.parts) > PARTS:
                self.parts.clear()
            part = self.parts[end] = self.bytes[:end]
        return part
