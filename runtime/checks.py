"""What an option may be: each check returns the value in one plain type, or refuses it by name.

Numbers may come as Python's, numpy's or a tensor's of one element; a bool is no number.
"""

import math
import numbers
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from model.errors import quoted
from runtime.errors import OptionError

MOST = (1 << 63) - 1  # what a tensor of integers holds


def whole(name: str, value: object, least: int, most: int = MOST, expected: str = "") -> int:
    """
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
    """A number for which `holds` is true; nothing is true of NaN.

    >>> number("top_p", 1, lambda p: 0 < p <= 1, "above 0 and at most 1")
    1.0
    """
    found = plain(value)
    result = math.nan
    if isinstance(found, numbers.Real) and not isinstance(found, bool):
        with suppress(OverflowError):  # an integer beyond all floats
            result = float(found)
    require(not math.isnan(result) and holds(result), name, value, expected)
    return result


def truth(name: str, value: object) -> bool:
    found = plain(value)
    require(isinstance(found, bool), name, value, "True or False")
    return bool(found)


def choice(name: str, value: object, choices: Collection[str]) -> str:
    require(isinstance(value, str) and value in choices, name, value, f"one of {', '.join(choices)}")
    return str(value)


def plain(value: Any) -> Any:
    """A scalar of numpy, or a tensor of no dimensions, as the Python object that it holds."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise OptionError(f"{name} is {quoted(value)}, and must be {expected}")
