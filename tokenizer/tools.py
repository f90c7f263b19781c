"""Calls of tools, as models write them.

A model that wants a tool's result writes JSON: Mistral's models a list after the control piece [TOOL_CALLS],
others one object after the other, in tags. `tokenizer.tool_messages` checks what clients send.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import string
from dataclasses import dataclass

from tokenizer.errors import TokenizerError
from tokenizer.json_values import check_depth, is_text, write_json

OPENINGS = ("[TOOL_CALLS]", "<tool_call>")  # tokens with which models begin calls
BETWEEN = re.compile(r"(?:\s|\[TOOL_CALLS\]|</?tool_call>)*")  # what may stand around calls


@dataclass(frozen=True)
class Call:
    """A model's call of a tool.

    arguments  JSON text. A client may send back any text that a model wrote in its place
    id         the name by which a result refers to the call. None if the model gave none
    """

    name: str
    arguments: str
    id: str | None = None


def parse_calls(text: str) -> list[Call]:
    """Return the calls that a model has written, at least one.

    >>> parse_calls('[{"name": "add", "arguments": {"a": 1}, "id": "x12345678"}]')
    [Call(name='add', arguments='{"a": 1}', id='x12345678')]
    >>> parse_calls('<tool_call>\\n{"name": "now", "arguments": {}}\\n</tool_call>')
    [Call(name='now', arguments='{}', id=None)]

    Raises `TokenizerError` if the text is anything else, or if it ends too early.
    """
    decoder = json.JSONDecoder(parse_constant=finite, parse_float=finite)
    values: list[object] = []
    at = past(text, 0)
    try:
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            values += value if isinstance(value, list) else [value]
            at = past(text, end)
    except (ValueError, RecursionError):
        raise no_calls(f"no JSON at character {at} of {len(text)}") from None
    if not values:
        raise no_calls(f"nothing in {len(text)} characters")
    return [parsed(value, f"call {i + 1} of {len(values)}") for i, value in enumerate(values)]


def parsed(value: object, what: str) -> Call:
    """Return the call that an object is. `what` is its name in messages."""
    if not isinstance(value, dict):
        raise no_calls(f"{what} is no object")
    name, given, arguments = value.get("name"), value.get("id"), value.get("arguments", {})
    if not is_text(name) or not name:
        raise no_calls(f"{what} has no name")
    check_depth(arguments, f"the arguments of {what}")
    text = arguments if isinstance(arguments, str) else write_json(arguments)
    if not is_text(text):  # half of a surrogate pair, which a model can spell in JSON and UTF-8 cannot hold
        text = json.dumps(arguments)
    return Call(name, text, given if is_text(given) and given else None)


def new_call_id() -> str:
    """Return an id for a call: nine letters and digits, as Mistral's models were trained on."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def past(text: str, at: int) -> int:
    """Return where the next call begins, at `at` or after it."""
    return BETWEEN.match(text, at).end()  # type: ignore[union-attr]


def finite(number: str) -> float:
    """Return a number. Raises `ValueError` for NaN and Infinity, which Python reads and JSON lacks."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


def no_calls(reason: str) -> TokenizerError:
    return TokenizerError(
        f'the text calls no tools ({reason}); a call is {{"name": "...", "arguments": {{...}}}}'
    )
