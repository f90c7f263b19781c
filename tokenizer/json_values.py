"""JSON that callers and models write: arguments of calls, results, schemas.

Guarantee: a value of this module has at most MAX_DEPTH levels, so that what walks through it comes to its end
without filling Python's stack.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeGuard

from tokenizer.errors import TokenizerError, quoted

MAX_DEPTH = 128  # lists and objects in each other


def read_json(text: str, what: str) -> Any:
    """Return the value of a JSON text, or the text itself if it is no JSON. No text at all stands for {}.

    `what` is its name in messages.

    >>> read_json('{"city": "Oslo"}', "x"), read_json("It rains.", "x"), read_json("", "x")
    ({'city': 'Oslo'}, 'It rains.', {})

    Raises `TokenizerError` if the value has more than MAX_DEPTH levels.
    """
    try:
        return check_depth(json.loads(text or "{}"), what)
    except RecursionError:
        raise too_deep(what) from None
    except TokenizerError:
        raise
    except ValueError:  # no JSON, or a number of more digits than Python takes
        return text


def as_json(value: object, what: str) -> Any:
    """Return a caller's value as it comes back from JSON. Raises `TokenizerError` if JSON cannot hold it."""
    try:
        return check_depth(json.loads(json.dumps(value)), what)
    except RecursionError:
        raise too_deep(what) from None
    except TokenizerError:
        raise
    except (TypeError, ValueError) as error:
        raise TokenizerError(
            f"{what} cannot be written as JSON ({quoted(str(error))}); use JSON's types"
        ) from None


def write_json(value: object) -> str:
    """Return the JSON text of a value, with characters as they are, as models were trained on it."""
    return json.dumps(value, ensure_ascii=False)


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with each of its texts replaced by `change(text)`, keys included.

    >>> changed({"a": ["b", 1]}, str.upper)
    {'A': ['B', 1]}
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [changed(part, change) for part in value]
    if isinstance(value, dict):
        return {change(key): changed(part, change) for key, part in value.items()}
    return value


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that UTF-8 has. JSON can also spell halves of characters.

    >>> is_text("</s>"), is_text("\\ud800"), is_text(3)
    (True, False, False)
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_depth(value: Any, what: str) -> Any:
    """Return the value. Raises `TokenizerError` if it has more than MAX_DEPTH levels."""
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, (list, dict))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise too_deep(what)
        level = [
            part for holder in level for part in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return value


def too_deep(what: str) -> TokenizerError:
    return TokenizerError(f"{what}: JSON of more than {MAX_DEPTH} levels; make it flatter")
