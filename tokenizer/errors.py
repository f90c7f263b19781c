"""The one exception of this package."""

from __future__ import annotations


class TokenizerError(ValueError):
    """A tokenizer file, a text, a token id or a conversation that cannot be used.

    The message is one line: what is wrong, with its number, and what to do about it.
    """
