"""Random JSON schemas whose texts end: all that can go on and on has a bound."""

from random import Random
from typing import Any

FORMATS = ("date", "time", "date-time", "ipv4", "uuid")
PATTERNS = ("^[a-z]{2,5}$", "^(on|off)$", "^[A-Z][0-9]{1,3}$", "^é+.?$")
WORDS = ("name", "größe", "a b", 'quo"te', "", "id", "价格", "x\ny", "🦊")
VALUES = (None, True, False, 0, -3, 1.5, "", "red", "fünf", 'a"b\\', "🦊🦊", [], [1, "x"], {"k": [None]})


def random_schema(chance: Random, depth: int = 0) -> dict[str, Any]:
    kinds = [boolean, integer, number, string, choice, constant]
    if depth < 2:
        kinds += [array, array, record, record, record, either, mapping, several, tuple_of, referring]
    return chance.choice(kinds[-8:] if depth == 0 and chance.random() < 0.7 else kinds)(chance, depth + 1)


def boolean(chance: Random, depth: int) -> dict[str, Any]:
    return {"type": chance.choice(("boolean", "null"))}


def integer(chance: Random, depth: int) -> dict[str, Any]:
    least = chance.randint(-2000, 2000)
    most = least + chance.choice((20, 1000))
    below = {"exclusiveMaximum": most} if chance.random() < 0.3 else {"maximum": most}
    step = {"multipleOf": chance.randint(2, 9)} if chance.random() < 0.3 else {}
    return {"type": "integer", "minimum": least} | below | step


def number(chance: Random, depth: int) -> dict[str, Any]:
    least = chance.randint(-50, 50) / 4
    return {"type": "number", "minimum": least, "maximum": least + chance.randint(1, 100) / 8}


def string(chance: Random, depth: int) -> dict[str, Any]:
    match chance.randrange(3):
        case 0:
            return {"type": "string", "pattern": chance.choice(PATTERNS), "maxLength": 9}
        case 1:
            return {"type": "string", "format": chance.choice(FORMATS)}
    least = chance.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 6)}


def choice(chance: Random, depth: int) -> dict[str, Any]:
    return {"enum": chance.sample(VALUES, chance.randint(1, 5))}


def constant(chance: Random, depth: int) -> dict[str, Any]:
    return {"const": chance.choice(VALUES)}


def array(chance: Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 2)
    sizes = {"minItems": least, "maxItems": least + chance.randint(0, 2)}
    return {"type": "array", "items": random_schema(chance, depth)} | sizes


def tuple_of(chance: Random, depth: int) -> dict[str, Any]:
    items = [random_schema(chance, depth) for _ in range(chance.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": chance.randint(0, len(items))}


def record(chance: Random, depth: int) -> dict[str, Any]:
    names = chance.sample(WORDS, chance.randint(1, 4))
    required = [name for name in names if chance.random() < 0.6]
    properties = {name: random_schema(chance, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def mapping(chance: Random, depth: int) -> dict[str, Any]:
    """An object with names of its own choice."""
    return {"type": "object", "additionalProperties": random_schema(chance, depth), "maxProperties": 2}


def either(chance: Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(chance, depth) for _ in range(chance.randint(2, 3))]}


def several(chance: Random, depth: int) -> dict[str, Any]:
    """A value of several types."""
    return {"type": ["null", "integer"], "minimum": 0, "maximum": 99, "description": "a number, or nothing"}


def referring(chance: Random, depth: int) -> dict[str, Any]:
    """An object that names another schema twice, which is in it."""
    here = {"$defs": {"part": random_schema(chance, 2)}}
    parts = {name: {"$ref": "#/$defs/part"} for name in ("one", "two")}
    if depth > 1:  # a reference starts at the root
        return record(chance, depth)
    return here | {"type": "object", "properties": parts, "required": ["two"], "additionalProperties": False}
