"""Messages and tools as clients send them, and random ones that mistral-common accepts."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from typing import Any

from tests.tokenizer.hard_texts import hard_text

Messages = list[dict[str, Any]]
Text = Callable[[random.Random], str]
ID = "a1B2c3D4e"


def call(name: str = "add", arguments: str = '{"a": 1}', of: str = ID) -> dict[str, Any]:
    return {"id": of, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: dict[str, Any], content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(made)}


def result(content: Any, of: str = ID) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": of, "content": content}


def tool(name: str = "add", **parts: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **parts}}


USER, ANSWER, SYSTEM = ({"role": r, "content": "x"} for r in ("user", "assistant", "system"))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "description": "é"}}, "required": ["a"]}
ADD = tool(description="Adds.", parameters=SCHEMA)


def random_name(chance: random.Random, length: int | None = None) -> str:
    """Letters and digits, nine of which are an id of Mistral's."""
    return "".join(chance.choices(string.ascii_letters + string.digits, k=length or chance.randint(1, 64)))


def random_value(chance: random.Random, text: Text = hard_text, depth: int = 0) -> Any:
    """Anything that JSON holds, and the numbers that only Python's JSON holds."""
    kind = chance.randrange(4 if depth == 3 else 7)
    if kind < 2:
        return text(chance)
    if kind == 2:
        return chance.choice([None, True, False, 0, -1, 10**30, 0.1, -0.0, 1e300, 5e-324])
    if kind == 3:
        return chance.choice([chance.randrange(-(10**9), 10**9), chance.random(), float("inf"), float("nan")])
    values = [random_value(chance, text, depth + 1) for _ in range(chance.randrange(4))]
    return values if kind == 4 else {text(chance): value for value in values}


def random_json(chance: random.Random, text: Text = hard_text) -> str:
    """JSON in several styles, and texts that are none or only nearly."""
    if chance.random() < 0.2:
        return text(chance)
    written = json.dumps(
        random_value(chance, text),
        ensure_ascii=chance.random() < 0.5,
        indent=chance.choice([None, None, 2]),
        separators=chance.choice([None, (",", ":"), (" , ", " : ")]),
    )
    return written if chance.random() < 0.9 else written[: chance.randrange(len(written))]


def random_conversation(chance: random.Random, text: Text = hard_text) -> Messages:
    messages: Messages = [{"role": "system", "content": text(chance)}] if chance.random() < 0.5 else []
    for turn in reversed(range(chance.randint(1, 3))):
        messages.append({"role": "user", "content": text(chance)})
        for _ in range(chance.randrange(3)):
            ids = [random_name(chance, 9) for _ in range(chance.randint(1, 3))]
            messages.append(calls(*(call(random_name(chance), random_json(chance, text), of) for of in ids)))
            messages += [result(random_json(chance, text), of) for of in chance.sample(ids, len(ids))]
        if turn:
            messages.append({"role": "assistant", "content": text(chance) + "."})
    return messages


def random_tools(chance: random.Random, text: Text = hard_text) -> list[dict[str, Any]]:
    """Up to three tools, with any of the keys that they may have."""
    made = []
    for _ in range(chance.randrange(4)):
        inner = {text(chance): {"type": "string", "description": text(chance)} for _ in range(2)}
        optional = {
            "parameters": {"properties": inner, "type": "object", "required": list(inner)},
            "strict": True,
            "description": chance.choice([None, text(chance)]),
        }
        keys = chance.sample(sorted(optional), chance.randrange(4))
        made.append(tool(random_name(chance), **{key: optional[key] for key in keys}))
    return made
