"""Checks of option values. Each returns the value as a plain Python object, or raises `OptionError`.

A number may be Python's, numpy's or a tensor of one element. A bool is no number.
"""

import json
import math
import numbers
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from model.errors import quoted
from runtime.errors import OptionError

MOST = (1 << 63) - 1  # the largest int64


def whole(name: str, value: object, least: int, most: int = MOST, expected: str = "") -> int:
    """An integer from `least` to `most`.

    >>> whole("slots", 3, least=1)
    3
    >>> whole("slots", True, least=1, most=8)
    Traceback (most recent call last):
        ...
    runtime.errors.OptionError: slots is True, and must be from 1 to 8
    """
    found = plain(value)
    right = isinstance(found, int) and not isinstance(found, bool) and least <= found <= most
    require(right, name, value, expected or f"from {least} to {most}")
    return int(found)


def number(name: str, value: object, holds: Callable[[float], bool], expected: str) -> float:
    """A number for which `holds` is true. NaN never passes.

    >>> number("top_p", 1, lambda p: 0 < p <= 1, "above 0 and at most 1")
    1.0
    """
    found = plain(value)
    result = math.nan
    if isinstance(found, numbers.Real) and not isinstance(found, bool):
        with suppress(OverflowError):  # an integer larger than any float
            result = float(found)
    require(not math.isnan(result) and holds(result), name, value, expected)
    return result


def truth(name: str, value: object) -> bool:
    found = plain(value)
    require(isinstance(found, bool), name, value, "True or False")
    return bool(found)


def one_of(name: str, value: object, words: Collection[str]) -> str:
    require(isinstance(value, str) and value in words, name, value, f"one of {', '.join(words)}")
    return str(value)


def json_object(name: str, value: object) -> str:
    """The JSON text of an object, which is given as such a text or as a mapping.

    >>> json_object("json_schema", {"type": "null"})
    '{"type": "null"}'
    >>> json_object("json_schema", '{"type": ')
    Traceback (most recent call last):
        ...
    runtime.errors.OptionError: json_schema is no JSON: Expecting value: line 1 column 10 (char 9)
    """
    expected = "a JSON object, as a mapping or a text"
    require(isinstance(value, (str, Mapping)), name, value, expected)
    try:
        text = value if isinstance(value, str) else json.dumps(dict(value))  # type: ignore[call-overload]
        found = json.loads(text)
    except RecursionError:
        raise OptionError(f"{name} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} is no JSON: {error}") from None
    require(isinstance(found, dict), name, value, expected)
    return text


def plain(value: Any) -> Any:
    """The Python object in a numpy scalar or a tensor of no dimensions; any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise OptionError(f"{name} is {quoted(value)}, and must be {expected}")
