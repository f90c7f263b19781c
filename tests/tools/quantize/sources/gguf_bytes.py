"""Headers of GGUF files byte by byte, for files that no library writes."""

from __future__ import annotations

import struct
from collections.abc import Sequence

TEXT, ARRAY, UINT32 = 8, 9, 4
F32 = 0


def text(value: bytes | str) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def number(name: bytes | str, value: int) -> bytes:
    return key(name, UINT32, struct.pack("<I", value))


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(
    name: bytes | str, shape: Sequence[int], kind: int = F32, offset: int = 0, dimensions: int | None = None
) -> bytes:
    """`shape` has the innermost dimension last."""
    sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)


def file(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    """A whole file, whose header is padded to the alignment."""
    found, promised = (len(tensors), len(keys)), counts
    head = b"GGUF" + struct.pack("<IQQ", version, *(promised or found)) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % align) + data
