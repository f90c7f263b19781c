"""Single tokens, as answers show them."""

from __future__ import annotations

from tokenizer import Tokenizer
from tokenizer.vocabulary import SPACE


def piece(tokenizer: Tokenizer, id: int) -> tuple[str, list[int]]:
    """What a token is by itself: as text, and as bytes. A byte of a longer character is `bytes:\\xe2` as
    text, and a control token has no bytes."""
    found = tokenizer.vocabulary.decoded[id]
    if isinstance(found, int):
        return f"bytes:\\x{found:02x}", [found]
    text = found.replace(SPACE, " ")
    return text, list(text.encode())
