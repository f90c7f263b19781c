"""Turn token ids into text, one id at a time.

Two things make this harder than joining pieces. A character outside the vocabulary arrives as several byte
pieces, and must not appear before it is whole. And the encoder puts a space before every text, which the
decoder drops at the start of a text and nowhere else.

Guarantee: the texts of all pushes and of the flush join to what `Tokenizer.decode` gives for the same ids,
because `decode` is this loop. The state is at most three bytes and one flag.
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

    The fox takes four bytes, and appears with the last of them. The space of the first piece is the
    encoder's, and that of the second is the text's own:

    >>> pieces = ("▁A", "▁fox", 0xF0, 0x9F, 0xA6, 0x8A)
    >>> decoder = StreamDecoder(Vocabulary(pieces, control={}, strip_first=True, strip_all=False))
    >>> [decoder.push(i) for i in range(6)]
    ['A', ' fox', '', '', '', '🦊']
    >>> decoder.push(2), decoder.push(3), decoder.flush()  # a character that never becomes whole
    ('', '', '��')

    `prefix` holds the ids that the text continues. Their text is not given, but the next piece keeps its
    space:

    >>> StreamDecoder(decoder.vocabulary, prefix=[0]).push(1)
    ' fox'

    A prefix that ends inside a character leaves its bytes waiting, as if they had been pushed. Ids that
    complete the character give it whole. Otherwise each byte gives a U+FFFD.
    """

    def __init__(self, vocabulary: Vocabulary, prefix: Iterable[int] = ()) -> None:
        self.vocabulary = vocabulary
        self._waiting = bytearray()  # the start of a character, never a whole one
        self.at_start = True  # there is no text yet, so a leading space is the encoder's
        for token_id in prefix:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Take the next id. Return the text that is now certain, which may be "".

        Raises `TokenizerError` if there is no such id. The decoder is then unchanged and can go on.
        """
        piece = self._lookup(token_id)
        if isinstance(piece, int):
            self.at_start = False
            self._waiting.append(piece)
            return self._take_certain()
        return self.flush() + self._text(piece)

    def flush(self) -> str:
        """Give up an incomplete character. Return one U+FFFD for each of its bytes."""
        text = REPLACEMENT * len(self._waiting)
        self._waiting.clear()
        return text

    @property
    def in_character(self) -> bool:
        """Whether the ids so far end within a character."""
        return bool(self._waiting)

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
        if self.at_start and piece:
            if self.vocabulary.strip_first:
                piece = piece.removeprefix(SPACE)
            self.at_start = self.vocabulary.strip_all and not piece
        return piece.replace(SPACE, " ")

    def _take_certain(self) -> str:
        """Take the text out of the waiting bytes that more bytes cannot change."""
        text = ""
        while self._waiting:
            certain, used = first_certain(self._waiting)
            if not used:
                break
            text += certain
            del self._waiting[:used]
        return text


def first_certain(data: bytes | bytearray) -> tuple[str, int]:
    """Decode the start of `data` that more bytes cannot change. Return the text and its number of bytes.

    E2 82 may still become a character, and E2 82 AC is one. E2 41 never becomes one, so its first byte gives
    U+FFFD, and the caller decodes the rest afresh.

    >>> first_certain(b"\\xe2\\x82"), first_certain(b"\\xe2\\x82\\xac"), first_certain(b"\\xe2A")
    (('', 0), ('€', 3), ('�', 1))
    """
    if data[0] == 0xED and data[1:2] >= b"\xa0":  # half a surrogate pair, for which the codec would wait
        return REPLACEMENT, 1
    try:
        return codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return REPLACEMENT, 1
