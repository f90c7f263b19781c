"""Just enough of the protobuf wire format to look inside a sentencepiece model.

The sentencepiece library reports neither the kind of a user-defined piece nor the normalizer's settings, and
it answers a damaged file with a stack of C++ internals. Walking the bytes first gives us kinds, settings and
a clear refusal. Every length is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
MAX_TAG = (1 << 32) - 1  # the largest field number and type that every protobuf library reads


class WireError(ValueError):
    """The bytes are not a protobuf message."""


def read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Read the base-128 integer at `at`. Return it with the position after it.

    Each byte holds seven bits, the low ones first, and a top bit that means "more follows". 300 is
    0b10_0101100, so it is written as 1_0101100 0_0000010, which is AC 02:

    >>> read_varint(bytes([0xAC, 0x02]), 0, 2)
    (300, 2)

    Raises `WireError` if the number runs past `end`, or past the 64 bits that the format allows.
    """
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise WireError(f"ends inside a number at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise WireError(f"holds a number of more than 64 bits at byte {at}")


def varint(number: int) -> bytes:
    """Return `number` as `read_varint` reads it.

    >>> varint(300)
    b'\\xac\\x02'
    """
    head = b""
    while number > 0x7F:
        head += bytes([number & 0x7F | 0x80])
        number >>= 7
    return head + bytes([number])


def fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Walk the message in `data[start:end]`, yielding (number, wire type, start, end) for each field's value.

    Field 1 holding the text "hi" (tag 0A = 1 << 3 | 2, length 2), then field 3 holding the number 6 (tag 18):

    >>> list(fields(bytes([0x0A, 2, 0x68, 0x69, 0x18, 6]), 0, 6))
    [(1, 2, 2, 4), (3, 0, 5, 6)]

    Raises `WireError` if the bytes do not follow the format, or if a value runs past `end`.
    """
    at = start
    while at < end:
        tag, at = read_varint(data, at, end)
        if not 8 <= tag <= MAX_TAG:
            raise WireError(f"holds a field with the number {tag >> 3} at byte {at}")
        wire_type = tag & 7
        if wire_type == LENGTH_DELIMITED:
            length, at = read_varint(data, at, end)
            stop = at + length
        elif wire_type == VARINT:
            _, stop = read_varint(data, at, end)
        elif wire_type == FIXED32:
            stop = at + 4
        elif wire_type == FIXED64:
            stop = at + 8
        else:
            raise WireError(f"holds a field of unknown type {wire_type} at byte {at}")
        if stop > end:
            raise WireError(f"ends inside a field: {stop - end} bytes are missing at byte {end}")
        yield tag >> 3, wire_type, at, stop
        at = stop
