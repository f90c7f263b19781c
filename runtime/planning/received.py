"""Dataclasses as JSON, and back from JSON that another process wrote, which is checked."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from model.errors import quoted
from runtime.errors import DeviceError

T = TypeVar("T")

MOST = (1 << 63) - 1
MOST_ITEMS = 1 << 12  # of a list: above the layers of any model
MOST_TEXT = 1 << 10  # characters
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def as_json(value: Any) -> Any:
    """A dataclass, or anything in one, in types that JSON has."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: as_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value).removeprefix("torch.")
    return value


def from_json(kind: type[T], value: object, what: str) -> T:
    """The dataclass of this kind that `as_json` made `value` of. `what` names it in errors.

    Fields may have the types int (from 0), float (above 0), bool, str, device, dtype, tuples, other such dataclasses, and
    unions of these with None. Raises `DeviceError` if a field is missing, unknown, or no such value.

    >>> from runtime.planning.request import Budget
    >>> from_json(Budget, {"bytes": 5, "place": "memory on cpu"}, "a budget")
    Budget(bytes=5, place='memory on cpu')
    >>> from_json(Budget, {"bytes": "5", "place": "memory on cpu"}, "a budget")
    Traceback (most recent call last):
        ...
    runtime.errors.DeviceError: a budget: bytes is '5', and must be a whole number; run the same version on every rank
    """  # noqa: E501
    try:
        return typing.cast(T, read(kind, value, ""))
    except Unlike as error:
        raise DeviceError(f"{what}: {error}; run the same version on every rank") from None


class Unlike(Exception):
    """A value is not what the type of its field says."""


def read(hint: Any, value: object, name: str) -> object:
    """`value` as something of the type `hint`. Raises `Unlike`, naming the field."""
    if isinstance(hint, types.UnionType):  # always with None
        inner = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
        return None if value is None else read(inner, value, name)
    if typing.get_origin(hint) is tuple:
        return read_tuple(typing.get_args(hint), value, name)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, name)
    expected, convert = PLAIN[hint]
    try:
        return convert(value)
    except (TypeError, ValueError, KeyError, OverflowError, RuntimeError):
        raise Unlike(f"{name} is {quoted(value)}, and must be {expected}") from None


def read_tuple(hints: tuple[Any, ...], value: object, name: str) -> tuple[object, ...]:
    """Of any number of items, if the hints are a type and three dots."""
    if not isinstance(value, list) or len(value) > MOST_ITEMS:
        raise Unlike(f"{name} is {quoted(value)}, and must be a list")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise Unlike(f"{name} has {len(value)} items, and must have {len(hints)}")
    return tuple(read(hint, item, name) for hint, item in zip(hints, value, strict=True))


def read_dataclass(kind: Any, value: object, name: str) -> object:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(value, dict) or sorted(map(str, value)) != sorted(names):
        found = sorted(map(str, value)) if isinstance(value, dict) else value
        prefix = f"{name} has" if name else "there is"
        raise Unlike(f"{prefix} {quoted(found)}, and must have {', '.join(names)}")
    prefix = f"{name}." if name else ""
    return kind(**{each: read(hints[each], value[each], prefix + each) for each in names})


def read_int(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError
    return value


def read_float(value: object) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError
    return float(value)  # type: ignore[arg-type]


def read_bool(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def read_str(value: object) -> str:
    if type(value) is not str or len(value) > MOST_TEXT or not value.isprintable():
        raise ValueError
    return value


def read_device(value: object) -> torch.device:
    device = torch.device(read_str(value))
    if device.type not in ("cpu", "cuda"):
        raise ValueError
    return device


PLAIN: dict[Any, tuple[str, Callable[[object], object]]] = {
    int: ("a whole number", read_int),
    float: ("a number above 0", read_float),
    bool: ("true or false", read_bool),
    str: ("a line of text", read_str),
    torch.device: ("cpu, cuda or cuda:N", read_device),
    torch.dtype: (f"one of {', '.join(DTYPES)}", lambda value: DTYPES[read_str(value)]),
}
