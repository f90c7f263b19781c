"""Write a sentencepiece model: byte-pair encoding with byte fallback, and text left as it is.

Field numbers are those of sentencepiece_model.proto (github.com/google/sentencepiece).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizer.errors import TokenizerError, quoted
from tokenizer.vocabulary import MAX_PIECE_BYTES, MAX_PIECES, Kind
from tokenizer.wire import FIXED32, LENGTH_DELIMITED, VARINT, varint

BPE = 2  # the model type
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Piece:
    """A piece of a vocabulary. Of two pieces that encoding can make, it makes the one with the higher score,
    which is a float32 in the file."""

    text: str
    score: float
    kind: Kind


def serialize(
    pieces: Sequence[Piece],
    *,
    unk_id: int,
    bos_id: int,
    eos_id: int,
    pad_id: int = -1,
    dummy_prefix: bool = True,
) -> bytes:
    """Return the model of these pieces, in the order of their ids. A `pad_id` of -1 means that there is none.
    With `dummy_prefix`, encoding puts a space before every text.

    Raises `TokenizerError` if sentencepiece could not use the model.
    """
    check(pieces, {"unknown": unk_id, "begin": bos_id, "end": eos_id})
    trainer = number(3, BPE) + number(4, len(pieces)) + number(35, 1)  # model_type, vocab_size, byte_fallback
    ids = {40: unk_id, 41: bos_id, 42: eos_id, 43: pad_id}
    trainer += b"".join(number(field, i) for field, i in ids.items())
    names = {45: unk_id, 46: bos_id, 47: eos_id} | ({48: pad_id} if 0 <= pad_id < len(pieces) else {})
    trainer += b"".join(block(field, pieces[i].text.encode()) for field, i in names.items())
    normalizer = block(1, b"identity") + number(3, dummy_prefix) + number(4, 0) + number(5, 1)
    body = b"".join(
        block(1, block(1, p.text.encode()) + fixed(2, p.score) + number(3, p.kind)) for p in pieces
    )
    return body + block(2, trainer) + block(3, normalizer)


def check(pieces: Sequence[Piece], special: dict[str, int]) -> None:
    """Raises `TokenizerError` for pieces that make no model."""
    if len(pieces) > MAX_PIECES:
        raise TokenizerError(f"the vocabulary has {len(pieces)} pieces, and {MAX_PIECES} are the most")
    seen: set[str] = set()
    for place, piece in enumerate(pieces):
        if not 0 < len(piece.text.encode(errors="replace")) < MAX_PIECE_BYTES - 16 or "\0" in piece.text:
            raise TokenizerError(
                f"piece {place} is {quoted(piece.text)}, which is empty, too long or has a NUL"
            )
        if piece.text in seen:
            raise TokenizerError(f"piece {place} is {quoted(piece.text)}, as an earlier one is")
        if not math.isfinite(piece.score):
            raise TokenizerError(f"piece {place} has the score {piece.score}, and needs a finite one")
        seen.add(piece.text)
    if missing := BYTES - {piece.text for piece in pieces if piece.kind is Kind.BYTE}:
        raise TokenizerError(f"{len(missing)} of 256 byte pieces are missing (such as {min(missing)})")
    for name, place in special.items():
        if not 0 <= place < len(pieces):
            raise TokenizerError(f"the {name} piece has the id {place}, and there are {len(pieces)} pieces")
    kinds = [piece.kind for piece in pieces]
    if kinds.count(Kind.UNKNOWN) != 1 or kinds[special["unknown"]] is not Kind.UNKNOWN:
        raise TokenizerError(f"{kinds.count(Kind.UNKNOWN)} pieces are unknown ones, and one has to be")


def number(field: int, value: int) -> bytes:
    """A field with an integer. A negative one has the bits of 64."""
    return varint(field << 3 | VARINT) + varint(value & (1 << 64) - 1)


def fixed(field: int, value: float) -> bytes:
    return varint(field << 3 | FIXED32) + struct.pack("<f", value)


def block(field: int, value: bytes) -> bytes:
    return varint(field << 3 | LENGTH_DELIMITED) + varint(len(value)) + value
