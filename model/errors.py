"""What can be wrong with a model's files. The message names the thing, the number and the remedy."""

import reprlib


class ModelError(ValueError):
    """A configuration or checkpoint cannot be used. The message is one line for users."""


def quoted(value: object, limit: int = 80) -> str:
    """The repr of a value from a file or a caller, cut to `limit` characters, for a message.

    Control characters are escaped, so the message stays on one line and cannot control a terminal.

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
