"""Turning token ids into text, one id at a time.

Two things make this harder than joining pieces. A character outside the vocabulary arrives as several byte
pieces, and must not be shown before it is whole. And the encoder puts a space in front of every text, which
belongs to nobody: it is dropped at the start of a text and nowhere else.

Guarantee: however the ids are cut up, everything pushed plus the flush is what `Tokenizer.decode` gives for
all of them, because `decode` is this very loop. The state is at most three bytes and one flag.
"""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable

from tokenizer.errors import TokenizerError
from tokenizer.vocabulary import SPACE, Vocabulary

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Gives the text of a growing sequence of ids as soon as it is certain.

    The fox takes four bytes; it appears with the last of them. The space of the first piece was the
    encoder's, that of the second is the text's own:

    >>> pieces = ("▁A", "▁fox", 0xF0, 0x9F, 0xA6, 0x8A)
    >>> decoder = StreamDecoder(Vocabulary(pieces, control={}, strip_first=True, strip_all=False))
    >>> [decoder.push(i) for i in range(6)]
    ['A', ' fox', '', '', '', '🦊']
    >>> decoder.push(2), decoder.push(3), decoder.flush()  # a character that never gets whole
    ('', '', '��')

    `prefix` holds the ids that the text continues. Nothing of it is given back, but the next piece keeps its
    space:

    >>> StreamDecoder(decoder.vocabulary, prefix=[0]).push(1)
    ' fox'

    A prefix that breaks off inside a character leaves these bytes waiting, as if they had been pushed here:
    with the ids that complete it the whole character is given, without them a U+FFFD for each byte.
    """

    def __init__(self, vocabulary: Vocabulary, prefix: Iterable[int] = ()) -> None:
        self.vocabulary = vocabulary
        self._waiting = bytearray()  # the start of a character, never a whole one
        self._at_start = True  # no text so far, so that a leading space is the encoder's
        for token_id in prefix:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is now certain, "" if there is none.

        Raises:
            TokenizerError: No such id; the decoder is unchanged and can go on.
        """
        piece = self._lookup(token_id)
        if isinstance(piece, int):
            self._at_start = False
            self._waiting.append(piece)
            return self._take_certain()
        return self.flush() + self._text(piece)

    def flush(self) -> str:
        """Give up on the character that is waiting, if any: one U+FFFD for each of its bytes."""
        text = REPLACEMENT * len(self._waiting)
        self._waiting.clear()
        return text

    def _lookup(self, token_id: int) -> str | int:
        decoded = self.vocabulary.decoded
        try:
            index = operator.index(token_id)
        except TypeError:
            raise TokenizerError(f"a token id must be an integer, got {type(token_id).__name__}") from None
        if not 0 <= index < len(decoded):
            raise TokenizerError(
                f"token id {index} is outside this tokenizer's vocabulary of {len(decoded)} pieces; "
                "use the tokenizer.model that belongs to the checkpoint"
            )
        return decoded[index]

    def _text(self, piece: str) -> str:
        if self._at_start and piece:
            if self.vocabulary.strip_first:
                piece = piece.removeprefix(SPACE)
            self._at_start = self.vocabulary.strip_all and not piece
        return piece.replace(SPACE, " ")

    def _take_certain(self) -> str:
        """Take from the waiting bytes what more bytes cannot change."""
        text = ""
        while self._waiting:
            certain, used = first_certain(self._waiting)
            if not used:
                break
            text += certain
            del self._waiting[:used]
        return text


def first_certain(data: bytes | bytearray) -> tuple[str, int]:
    """Decode the start of `data` as far as more bytes cannot change it; return the text and its byte count.

    E2 82 may yet become a character, E2 82 AC is one, and E2 41 never will be: then the first byte becomes
    U+FFFD, and the rest is to be looked at afresh.

    >>> first_certain(b"\\xe2\\x82"), first_certain(b"\\xe2\\x82\\xac"), first_certain(b"\\xe2A")
    (('', 0), ('€', 3), ('�', 1))
    """
    if data[0] == 0xED and data[1:2] >= b"\xa0":  # half a surrogate pair, for which the codec would wait
        return REPLACEMENT, 1
    try:
        return codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return REPLACEMENT, 1
