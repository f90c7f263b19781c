"""Damage to JSON, both to the tree of values and to the text."""

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

from dev.harness.mutate.values import weird, weird_text


def mutated(value: Any, chance: Random, large: int = 1 << 20) -> Any:
    """A copy of the value with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(containers(value))
        if not places:
            return weird(chance, large)
        holder = chance.choice(places)
        if isinstance(holder, dict):
            change_object(holder, chance, large)
        else:
            change_list(holder, chance, large)
    return value


def containers(value: Any) -> Iterator[Any]:
    """All objects and lists in a tree that are not empty."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def change_object(holder: dict[str, Any], chance: Random, large: int) -> None:
    name = chance.choice(list(holder))
    match chance.randrange(8):
        case 0:
            del holder[name]
        case 1:
            holder[weird_text(chance, large)] = holder.pop(name)
        case 2:
            holder[weird_text(chance, large)] = weird(chance, large)
        case 3:
            other = chance.choice(list(holder))
            holder[name], holder[other] = holder[other], holder[name]
        case _:
            holder[name] = changed(holder[name], chance, large)


def change_list(holder: list[Any], chance: Random, large: int) -> None:
    at = chance.randrange(len(holder))
    match chance.randrange(6):
        case 0:
            del holder[at]
        case 1:
            holder.insert(at, copy.deepcopy(holder[at]))
        case 2:
            holder *= chance.choice((2, 100))
        case _:
            holder[at] = changed(holder[at], chance, large)


def changed(value: Any, chance: Random, large: int) -> Any:
    """A value to replace this one: near it, or quite different."""
    if isinstance(value, (int, float)) and abs(value) < 1e300 and chance.random() < 0.5:
        return chance.choice(
            (value + 1, value - 1, -value, value * 2, value * (1 << 20), value / 2, str(value))
        )
    return chance.choice((lambda: weird(chance, large), lambda: [value], lambda: {"a": value}))()


def as_text(value: Any, chance: Random) -> bytes:
    """The value as text, sometimes written in a way that JSON does not allow, or should not."""
    text = json.dumps(value, ensure_ascii=chance.random() < 0.7)
    match chance.randrange(24):
        case 0:
            text = text[: chance.randrange(len(text) + 1)]
        case 1:
            text += chance.choice(("\0", "x", "{}", " " * 1000))
        case 2:
            text = text.replace("1", "9" * 5000, 1)
        case 3:
            text = "[" * 100_000 + text
        case 4:
            text = text.replace('": ', '": {"a": ' * 3000, 1)
        case 5:
            text = "\ufeff" + text
        case 6:
            at = chance.randrange(len(text) + 1)
            text = (
                text[:at] + chance.choice(("\x01", "NaN", "\\u0000", '"', ",", "}", "-", "1e999")) + text[at:]
            )
        case 7 if text.startswith("{") and len(text) > 2:
            text = "{" + text[1:-1] + ", " + text[1:-1] + "}"  # every name twice
    encoding = "utf-16" if chance.randrange(60) == 0 else "utf-8"
    return text.encode(encoding, "surrogatepass")
