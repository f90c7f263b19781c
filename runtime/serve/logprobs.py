"""Log-probabilities of tokens, in the forms of chats and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.answer import Token
from tokenizer import Tokenizer
from tokenizer.vocabulary import SPACE


def piece(tokenizer: Tokenizer, id: int) -> tuple[str, list[int]]:
    """What a token is by itself: as text, and as bytes. A byte of a longer character is `bytes:\\xe2` as
    text, and a control token has no bytes."""
    found = tokenizer.vocabulary.decoded[id]
    if isinstance(found, int):
        return chr(found) if found < 0x80 else f"bytes:\\x{found:02x}", [found]
    text = found.replace(SPACE, " ")
    return text, list(text.encode())


def chat_form(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        text, data = piece(tokenizer, id)
        return {"token": text, "logprob": finite(logprob), "bytes": data}

    content = [
        one(token.id, token.logprob) | {"top_logprobs": [one(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_form(tokenizer: Tokenizer, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion, whose text so far has `offset` characters."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [piece(tokenizer, token.id)[0] for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {piece(tokenizer, id)[0]: finite(logprob) for id, logprob in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }


def finite(logprob: float) -> float:
    """A log-probability as JSON can write it. OpenAI writes -9999 for what is impossible.

    >>> finite(float("-inf"))
    -9999.0
    """
    return max(logprob, -9999.0)
