"""Tools and calls that clients send, in the form of OpenAI's API.

A tool is {"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}.
A call is {"id": ..., "type": "function", "function": {"name": ..., "arguments": JSON text}}.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from tokenizer.errors import TokenizerError, quoted
from tokenizer.json_values import as_json, changed, read_json
from tokenizer.tools import Call

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
PARTS = {"name": str, "description": str, "parameters": Mapping, "strict": bool}


def check_tools(tools: object) -> list[dict[str, Any]]:
    """Return the tools in JSON's types, none for None. Raises `TokenizerError` if they are no tools."""
    if tools is None:
        return []
    if not is_list(tools):
        raise TokenizerError(f"tools is a {type(tools).__name__}; give a list of tools")
    return [check_tool(tool, f"tool {i + 1} of {len(tools)}") for i, tool in enumerate(tools)]


def check_tool(tool: object, what: str) -> dict[str, Any]:
    """Return the tool in JSON's types. `what` is its name in messages."""
    _, function = check_function(tool, what, frozenset(), frozenset(PARTS))
    for key, due in PARTS.items():
        value = function.get(key)
        if value is not None and not isinstance(value, due):
            raise TokenizerError(f"{what} has a {key} of type {type(value).__name__}; give a {due.__name__}")
    if not NAME.fullmatch(function.get("name") or ""):
        name = quoted(function.get("name"))
        raise TokenizerError(f"{what} has the name {name}; use 1 to 64 of a-z, A-Z, 0-9, _ and -")
    checked: dict[str, Any] = as_json(tool, what)
    return checked


def check_calls(calls: object, where: str) -> tuple[Call, ...]:
    """Return the calls of a message, which is called `where`. Raises `TokenizerError` if they are none."""
    if not is_list(calls):
        raise TokenizerError(f"{where} has tool_calls of type {type(calls).__name__}; give a list")
    return tuple(check_call(call, f"call {i + 1} of {where}") for i, call in enumerate(calls))


def check_call(call: object, what: str) -> Call:
    """Return the call that a client sent back. `what` is its name in messages."""
    holder, function = check_function(call, what, frozenset({"id"}), frozenset({"name", "arguments"}))
    name, arguments, given = function.get("name"), function.get("arguments"), holder.get("id")
    for key, value in (("name", name), ("id", given)):
        if not isinstance(value, str) or not value:
            raise TokenizerError(f"{what} has the {key} {quoted(value)}; give the one that the model gave")
    if not isinstance(arguments, str):
        raise TokenizerError(f"{what} has arguments of type {type(arguments).__name__}; give JSON text")
    read_json(arguments, f"the arguments of {what}")
    return Call(str(name), arguments, str(given))


def check_function(
    value: object, what: str, beside: frozenset[str], within: frozenset[str]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return an object, and what it has under "function". The keys `beside` may stand beside that, and
    `within` in it. Raises `TokenizerError` if it is no such object."""
    if not isinstance(value, Mapping):
        raise TokenizerError(f"{what} is a {type(value).__name__}; give a dict with 'type' and 'function'")
    if value.get("type", "function") != "function":
        raise TokenizerError(f"{what} has the type {quoted(value['type'])}; use 'function', the only one")
    function = value.get("function")
    if not isinstance(function, Mapping):
        raise TokenizerError(f"{what} has a function of type {type(function).__name__}; give a dict")
    unknown = [*(value.keys() - beside - {"type", "function"}), *(function.keys() - within)]
    if unknown:
        raise TokenizerError(f"{what} has the unknown key {quoted(min(map(str, unknown)))}; leave it out")
    return value, function


def for_mistral(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools as Mistral's models were trained on them: each with all its keys, in one order."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool["function"]["name"],
                "description": tool["function"].get("description") or "",
                "parameters": tool["function"].get("parameters") or {},
            },
        }
        for tool in tools
    ]


def for_template(tools: Sequence[Mapping[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return the tools as chat templates see them, with `change` made to every text that is the client's."""
    return [
        {
            key: {part: changed(text, change) for part, text in value.items()} if key == "function" else value
            for key, value in tool.items()
        }
        for tool in tools
    ]


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
