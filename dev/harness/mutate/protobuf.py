"""Damage to a sentencepiece model as a protobuf message: to its fields, and to its bytes."""

import struct
from dataclasses import dataclass, replace
from random import Random

from dev.harness.mutate.values import weird_text
from tokenizer.wire import FIXED32, LENGTH_DELIMITED, VARINT, fields

PIECE, TRAINER, NORMALIZER = 1, 2, 3
HUGE = (0, 1, 127, 128, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@dataclass(frozen=True)
class Field:
    """A field of a message. `content` is what follows its tag and length."""

    number: int
    wire_type: int
    content: bytes


def parse(data: bytes) -> list[Field]:
    return [Field(number, kind, data[start:end]) for number, kind, start, end in fields(data, 0, len(data))]


def encoded(message: list[Field]) -> bytes:
    """
    >>> encoded([Field(1, LENGTH_DELIMITED, b"hi")])
    b'\\n\\x02hi'
    """
    parts = []
    for field in message:
        parts.append(varint(field.number << 3 | field.wire_type))
        if field.wire_type == LENGTH_DELIMITED:
            parts.append(varint(len(field.content)))
        parts.append(field.content)
    return b"".join(parts)


def varint(value: int) -> bytes:
    """
    >>> varint(300)
    b'\\xac\\x02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def damaged(message: list[Field], chance: Random) -> bytes:
    """The message with one to three changes to its fields, or one to its bytes."""
    if chance.random() < 0.25:
        return bytes_damaged(encoded(message), chance)
    message = list(message)
    for _ in range(chance.choice((1, 1, 2, 3))):
        change(message, chance)
    return encoded(message)


def bytes_damaged(data: bytes, chance: Random) -> bytes:
    at = chance.randrange(len(data))
    match chance.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at] + bytes(chance.randrange(256) for _ in range(8)) + data[at + 8 :]
        case 3:
            return data[:at] + varint(chance.choice(HUGE)) + data[at:]
        case 4:
            return bytes([chance.choice((0, 8, 10, 26, 0x80, 0xFF))]) * chance.choice(
                (1, 1000, 1 << 20, 8 << 20)
            )
        case _:
            return chance.choice((b"\n\0", b"PK\3\4", b"{}", b"\x80\x02}", b"GGUF")) + data


def change(message: list[Field], chance: Random) -> None:
    at = chance.randrange(len(message))
    if chance.random() < 0.3:  # mostly it would be a piece
        others = [i for i, field in enumerate(message) if field.number != PIECE]
        at = chance.choice(others or [at])
    field = message[at]
    match chance.randrange(7):
        case 0:
            del message[at : at + chance.choice((1, 1, 10, 5000))]
            if not message:
                message.append(field)
        case 1:
            message[at:at] = [field] * chance.choice((1, 2, 300))
        case 2:
            other = chance.randrange(len(message))
            message[at], message[other] = message[other], message[at]
        case 3:
            message.insert(
                at, Field(chance.choice((1, 2, 3, 4, 5, 200)), VARINT, varint(chance.choice(HUGE)))
            )
        case _:
            if field.wire_type == LENGTH_DELIMITED:
                message[at] = replace(field, content=inside(field, chance))


def inside(field: Field, chance: Random) -> bytes:
    """Damage inside a field: to the name, score and kind of a piece, or to one of the settings."""
    try:
        inner = parse(field.content)
    except ValueError:
        return weird_bytes(chance)
    match chance.randrange(4) if inner else 0:
        case 0:
            number = chance.choice((1, 2, 3, 4, 5, 35, 41, 42, 43, 44, 45, 46, 47, 48))
            kind = chance.choice((VARINT, LENGTH_DELIMITED, FIXED32))
            inner.append(Field(number, kind, content_of(kind, chance)))
        case 1:
            del inner[chance.randrange(len(inner))]
        case _:
            at = chance.randrange(len(inner))
            inner[at] = replace(inner[at], content=content_of(inner[at].wire_type, chance))
    return encoded(inner)


def content_of(kind: int, chance: Random) -> bytes:
    if kind == VARINT:
        return varint(chance.choice((*HUGE, 2, 3, 4, 5, 6, 7)))
    if kind == FIXED32:
        return struct.pack("<f", chance.choice((0.0, -1.0, 1e38, float("nan"), float("inf"), float("-inf"))))
    return weird_bytes(chance)


def weird_bytes(chance: Random) -> bytes:
    special = "\u2581", "<0x0A>", "<0xZZ>", "<s>", "[INST]", "<|im_start|>", "\u2581" * 50
    text = weird_text(chance, 300_000) if chance.random() < 0.6 else chance.choice(special)
    return chance.choice(
        (text.encode("utf-8", "surrogatepass"), bytes(chance.randrange(256) for _ in range(9)))
    )
