"""Damage to GGUF files: to keys, to tensors, to how both are written, and to any byte."""

import struct
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from dev.harness.mutate.values import NUMBERS, weird_text

TEXT, ARRAY, FLOAT, UINT32, BOOL = 8, 9, 6, 4, 7
CODES = {0: "B", 1: "b", UINT32: "I", FLOAT: "f", BOOL: "B", 10: "Q"}  # of the types that are written here
ALIGNMENT = 32
COUNTS = (0, 1, 2, 31, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1)


@dataclass(frozen=True)
class Key:
    """A key and its value. That of an array is its values' type and a list of them."""

    name: bytes
    kind: int
    value: Any


@dataclass(frozen=True)
class Tensor:
    """The innermost dimension of `shape` is the first. A file may give it another place than `data` has."""

    name: bytes
    shape: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass(frozen=True)
class File:
    """A GGUF file taken apart."""

    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]

    def encoded(self, version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(self.tensors), len(self.keys))))
        head += b"".join(text(key.name) + struct.pack("<I", key.kind) + encoded(key) for key in self.keys)
        body = b""
        for tensor in self.tensors:
            sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            place = len(body) if tensor.offset is None else tensor.offset
            head += text(tensor.name) + sizes + struct.pack("<IQ", tensor.kind, place)
            body += tensor.data + bytes(-len(tensor.data) % ALIGNMENT)
        return head + bytes(-len(head) % ALIGNMENT) + body


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def encoded(key: Key) -> bytes:
    if isinstance(key.value, bytes) and key.kind != TEXT:
        return key.value  # damaged: bytes that the type does not have
    if key.kind == ARRAY:
        kind, values = key.value
        return struct.pack("<IQ", kind, len(values)) + b"".join(scalar(kind, value) for value in values)
    return scalar(key.kind, key.value)


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == TEXT else struct.pack("<" + CODES[kind], value)


def harmless(file: File, chance: Random) -> bytes:
    """The same model written differently: keys and tensors in another order, and more keys."""
    keys, tensors = [*file.keys, Key(b"note", TEXT, some_bytes(chance))], list(file.tensors)
    keys[-1] = replace(keys[-1], value=keys[-1].value.decode("utf-8", "ignore").encode())
    chance.shuffle(keys)
    chance.shuffle(tensors)
    return File(tuple(keys), tuple(tensors)).encoded(chance.choice((2, 3)))


def damaged(file: File, chance: Random) -> bytes:
    keys, tensors = list(file.keys), list(file.tensors)
    version, counts = 3, None
    for _ in range(chance.choice((1, 1, 2, 3))):
        match chance.randrange(6):
            case 0 | 1:
                damage_keys(keys, chance)
            case 2 | 3:
                damage_tensors(tensors, chance)
            case 4:
                counts = (chance.choice((len(tensors), *COUNTS)), chance.choice((len(keys), *COUNTS)))
            case _:
                version = chance.choice((0, 1, 2, 4, 3 << 24, 1 << 31))
    data = bytearray(File(tuple(keys), tuple(tensors)).encoded(version, counts))
    if chance.randrange(4) == 0:
        damage_bytes(data, chance)
    return bytes(data)


def damage_keys(keys: list[Key], chance: Random) -> None:
    if not keys:
        return
    at = chance.randrange(len(keys))
    key = keys[at]
    match chance.randrange(7):
        case 0:
            del keys[at]
        case 1:
            keys.append(key)
        case 2:
            keys[at] = replace(key, name=some_bytes(chance))
        case 3:
            kind = chance.choice((0, 1, ARRAY, 13, 1 << 31))
            keys[at] = Key(key.name, kind, chance.randbytes(chance.randrange(30)))
        case 4:
            count = chance.choice(COUNTS)
            keys[at] = Key(key.name, ARRAY, struct.pack("<IQ", chance.choice((0, TEXT, ARRAY)), count))
        case 5 if key.kind == ARRAY:
            damage_array(keys, at, chance)
        case _:
            keys[at] = Key(key.name, *other_value(chance))


def damage_array(keys: list[Key], at: int, chance: Random) -> None:
    kind, values = keys[at].value if not isinstance(keys[at].value, bytes) else (UINT32, [])
    values = list(values)
    if values and chance.random() < 0.5:
        del values[chance.randrange(len(values)) :]
    elif values:
        place = chance.randrange(len(values))
        values[place] = some_bytes(chance) if kind == TEXT else chance.choice((0, 1, 3, 6, values[0]))
    keys[at] = replace(keys[at], value=(kind, values))


def other_value(chance: Random) -> tuple[int, Any]:
    """A type and a value of it."""
    match chance.randrange(4):
        case 0:
            return TEXT, some_bytes(chance)
        case 1:
            return BOOL, chance.randrange(3)
        case 2:
            numbers = [n for n in NUMBERS if (isinstance(n, float) and abs(n) < 3e38) or n != n]
            return FLOAT, chance.choice(numbers)
        case _:
            return 10, chance.choice(COUNTS)


def damage_tensors(tensors: list[Tensor], chance: Random) -> None:
    if not tensors:
        return
    at = chance.randrange(len(tensors))
    tensor = tensors[at]
    match chance.randrange(7):
        case 0:
            del tensors[at]
        case 1:
            tensors.append(tensor)
        case 2:
            tensors[at] = replace(tensor, name=some_bytes(chance))
        case 3:
            tensors[at] = replace(tensor, kind=chance.choice((*range(45), 1 << 31)))
        case 4:
            place = chance.randrange(4)
            shape = (*tensor.shape[:place], chance.choice(COUNTS), *tensor.shape[place + 1 :])
            tensors[at] = replace(tensor, shape=shape)
        case 5:
            tensors[at] = replace(tensor, shape=tensor.shape * chance.choice((0, 2, 5)))
        case _:
            tensors[at] = replace(tensor, offset=chance.choice((*COUNTS, 32, 64)))


def damage_bytes(data: bytearray, chance: Random) -> None:
    at = chance.randrange(len(data)) if chance.random() < 0.3 else chance.randrange(min(len(data), 3000))
    match chance.randrange(4):
        case 0:
            del data[at:]
        case 1:
            del data[at : at + chance.randrange(1, 100)]
        case 2:
            data[at:at] = chance.randbytes(chance.randrange(1, 50))
        case _:
            data[at : at + 8] = struct.pack("<Q", chance.choice(COUNTS))


def some_bytes(chance: Random) -> bytes:
    if chance.random() < 0.3:
        return chance.randbytes(chance.choice((0, 1, 5, 2000)))
    return weird_text(chance, 20_000).encode("utf-8", "surrogatepass")
