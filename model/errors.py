"""What can be wrong with a model's files: one exception, whose message names the thing, the number and the
remedy."""

import reprlib


class ModelError(ValueError):
    """A configuration or checkpoint that cannot be used as it is; the message is one line, fit for a user."""


def quoted(value: object, limit: int = 80) -> str:
    """A value from a file or a caller, as a message may show it: its repr, in at most `limit` characters.

    Control characters come out escaped, so a message stays one line and a terminal is not told anything.

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
