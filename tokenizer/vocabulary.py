"""What a sentencepiece model file says about its pieces, as a table that decoding can index.

Guarantees: every id from 0 to `len(decoded) - 1` is described. No text encodes to a control id by the safe
copy of the model that `parse_model` returns. Limits on the number of fields bound what a hostile file can
cost.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from tokenizer.errors import quoted
from tokenizer.wire import LENGTH_DELIMITED, VARINT, WireError, fields, read_varint, varint

SPACE = "\u2581"  # how a piece spells a space
MAX_PIECES = 1 << 17  # Mixtral's models have up to 32,768
MAX_PIECE_BYTES = 1 << 10  # for all that the file says of one piece
MAX_PIECE_FIELDS = 8  # a name, a score and a kind
MAX_SECTIONS = 16
MAX_SETTINGS = 1 << 14  # in one section

Field = tuple[int, int, int, int]  # what `fields` yields

# A user-defined piece that is a marker of a chat format, such as <|im_start|>, </s> or [INST].
MARKER = re.compile(r"<\|[^<>|]*\|>|</?s>|\[/?[A-Z][A-Z_]*\]")

PIECE_TAG = b"\x0a"  # field 1, the pieces
AS_CONTROL = b"\x18\x03"  # after a piece's other fields, this makes its kind (field 3) CONTROL
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"  # after a model, this keeps its normalizer (field 3) from adding a space


class Kind(IntEnum):
    """The kinds of pieces, numbered as in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What each id decodes to, and how text begins.

    decoded     for each id a piece's text, or the value of a byte-fallback piece. SPACE stands for a space in
                the text, and a control piece has none
    control     the ids of control pieces, by name
    strip_first drop one SPACE at the start of a text, which the encoder has put there
    strip_all   drop every SPACE at the start of a text, since the encoder squeezes runs of spaces
    """

    decoded: tuple[str | int, ...]
    control: Mapping[str, int]
    strip_first: bool
    strip_all: bool

    def padded(self, size: int) -> Vocabulary:
        """Return the same vocabulary with `size` ids. Added ids decode to nothing."""
        return replace(self, decoded=self.decoded + ("",) * (size - len(self.decoded)))


def parse_model(data: bytes, special: Collection[str] = ()) -> tuple[Vocabulary, bytes]:
    """Read the vocabulary of a serialized sentencepiece model. Return it with a safe copy of the model.

    Sentencepiece finds user-defined pieces in plain text and turns them into their ids. If such a piece is a
    marker of a chat format, any text could speak for the system. In the safe copy such pieces are control
    pieces, which text never matches. So are ordinary pieces that other files call `special`.

    Raises `WireError` if the bytes are not a sentencepiece model.
    """
    safe = bytearray()  # the safe copy of data[:copied]
    copied = previous = 0  # the previous field ends at data[previous]
    pieces: list[tuple[str, Kind]] = []
    unknown_surface = " \u2047 "  # sentencepiece's own default
    dummy_prefix = squeeze = True  # the format's defaults

    sections = 0
    for number, wire_type, start, end in _counted(fields(data, 0, len(data)), MAX_PIECES, "pieces"):
        sections += number != 1
        if sections > MAX_SECTIONS:
            raise WireError(f"holds more than {MAX_SECTIONS} sections of settings")
        if number == 1 and wire_type == LENGTH_DELIMITED:
            if end - start > MAX_PIECE_BYTES:
                raise WireError(
                    f"spends {end - start} bytes on piece {len(pieces)} (limit {MAX_PIECE_BYTES})"
                )
            name, kind = _piece(data, start, end, len(pieces))
            marker = kind is Kind.USER_DEFINED and MARKER.fullmatch(name)
            if marker or (name in special and kind in (Kind.NORMAL, Kind.USER_DEFINED)):
                kind = Kind.CONTROL
                piece = data[start:end] + AS_CONTROL
                safe += data[copied:previous] + PIECE_TAG + varint(len(piece)) + piece
                copied = end
            pieces.append((name, kind))
        elif number == 2 and wire_type == LENGTH_DELIMITED:  # trainer_spec
            for field, field_type, at, stop in _counted(fields(data, start, end), MAX_SETTINGS, "settings"):
                if field == 44 and field_type == LENGTH_DELIMITED:
                    unknown_surface = data[at:stop].decode("utf-8", "replace")
        elif number == 3 and wire_type == LENGTH_DELIMITED:  # normalizer_spec
            for field, field_type, at, stop in _counted(fields(data, start, end), MAX_SETTINGS, "settings"):
                if field == 3 and field_type == VARINT:
                    dummy_prefix = bool(read_varint(data, at, stop)[0])
                elif field == 4 and field_type == VARINT:
                    squeeze = bool(read_varint(data, at, stop)[0])
        previous = end
    if not pieces:
        raise WireError("holds no pieces")

    vocabulary = Vocabulary(
        decoded=tuple(_decoded(name, kind, unknown_surface) for name, kind in pieces),
        control={name: i for i, (name, kind) in enumerate(pieces) if kind is Kind.CONTROL},
        strip_first=dummy_prefix or squeeze,
        strip_all=squeeze,
    )
    return vocabulary, bytes(safe) + data[copied:]


def _counted(found: Iterator[Field], most: int, what: str) -> Iterator[Field]:
    """Pass on up to `most` fields. Raises `WireError` if there are more."""
    for count, field in enumerate(found):
        if count == most:
            raise WireError(f"holds more than {most} {what}")
        yield field


def _piece(data: bytes, start: int, end: int, index: int) -> tuple[str, Kind]:
    """Return one piece's name and kind."""
    name, kind = "", Kind.NORMAL
    parts = _counted(fields(data, start, end), MAX_PIECE_FIELDS, f"fields in piece {index}")
    for number, wire_type, at, stop in parts:
        if number == 1 and wire_type == LENGTH_DELIMITED:
            try:
                name = data[at:stop].decode()
            except UnicodeDecodeError:
                raise WireError(f"spells piece {index} in broken UTF-8") from None
        elif number == 3 and wire_type == VARINT:
            value = read_varint(data, at, stop)[0]
            if not Kind.NORMAL <= value <= Kind.BYTE:
                raise WireError(f"gives piece {index} the unknown kind {value}")
            kind = Kind(value)
    if not name:
        raise WireError(f"leaves piece {index} without a name")
    if kind is Kind.BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", name):
        raise WireError(f"calls piece {index} a byte, but its name is {quoted(name)}")
    return name, kind


def _decoded(name: str, kind: Kind, unknown_surface: str) -> str | int:
    """Return what a piece decodes to.

    >>> [_decoded(*p, "?") for p in (("<0x0A>", Kind.BYTE), ("</s>", Kind.CONTROL), ("day", Kind.NORMAL))]
    [10, '', 'day']
    """
    if kind is Kind.BYTE:
        return int(name[3:5], 16)
    if kind is Kind.CONTROL:
        return ""
    return unknown_surface if kind is Kind.UNKNOWN else name
