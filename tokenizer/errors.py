"""The one exception of this package, and how its messages show what others wrote."""

from __future__ import annotations

import reprlib


class TokenizerError(ValueError):
    """A tokenizer file, a text, a token id or a conversation that cannot be used.

    The message is one line. It says what is wrong, with its number, and what to do about it.
    """


def quoted(value: object, limit: int = 80) -> str:
    """Return the repr of a value from a file or a caller, in at most `limit` characters, for a message.

    Control characters come out escaped, so the message stays one line and gives a terminal no commands.

    >>> print(quoted("two\\nlines"), quoted("\\x1b[2J" + "y" * 10**6, limit=24))
    'two\\nlines' '\\x1b[2Jyy...yyyyyyyyyy'
    """
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = shorten.maxlong = limit
    try:
        text = shorten.repr(value)
    except ValueError:  # Python refuses to write out an integer of more than 4,300 digits
        text = f"<{type(value).__name__}>"
    if len(text) <= limit:
        return text
    kept = limit - len("...")
    return f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
