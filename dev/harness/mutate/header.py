"""Damage to safetensors files: to what the header says, to how it is written, and to the bytes around it."""

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from dev.harness.mutate.json_tree import as_text, mutated
from dev.harness.mutate.values import NUMBERS, weird_text

DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "C64", "F8_E4M3", "F4", "X",
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """A safetensors file taken apart."""

    header: dict[str, Any]
    body: bytes

    @staticmethod
    def parse(data: bytes) -> "File":
        length = int.from_bytes(data[:8], "little")
        return File(json.loads(data[8 : 8 + length]), data[8 + length :])


def harmless(file: File, chance: Random) -> bytes:
    """The same tensors written differently: names and bytes in another order, spaces, metadata."""
    names = [name for name in file.header if name != "__metadata__"]
    chance.shuffle(names)
    header: dict[str, Any] = {}
    parts, offset = [], 0
    for name in names:
        begin, end = file.header[name]["data_offsets"]
        header[name] = file.header[name] | {"data_offsets": [offset, offset + end - begin]}
        parts.append(file.body[begin:end])
        offset += end - begin
    chance.shuffle(names)
    metadata = file.header.get("__metadata__", {}) | {"note": weird_text(chance, 1000).replace("\ud800", "")}
    header = {"__metadata__": metadata} | {name: header[name] for name in names}
    text = json.dumps(header, indent=chance.choice((None, 0, 3))).encode() + b" " * chance.randrange(70)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def damaged(file: File, chance: Random) -> bytes:
    header, body = dict(file.header), file.body
    for _ in range(chance.choice((1, 1, 2))):
        if chance.random() < 0.4:
            header = mutated(header, chance, large=200_000)
            if not isinstance(header, dict) or not header:
                break
        else:
            change_entry(header, chance, len(body))
    text = as_text(header, chance)
    length: Any = len(text)
    if chance.randrange(10) == 0:
        length = chance.choice(
            (0, 1, length - 1, length + 1, length + len(body), 1 << 40, (1 << 64) - 1, 10**8)
        )
    if chance.randrange(10) == 0:
        body = chance.choice((body[:-1], body + b"\0", body[: chance.randrange(len(body))], b"", body * 2))
    data = (length % (1 << 64)).to_bytes(8, "little") + text + body
    return data[: chance.randrange(12)] if chance.randrange(40) == 0 else data


def change_entry(header: dict[str, Any], chance: Random, size: int) -> None:
    """Damage one tensor's entry in a way that only this format knows."""
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "shape" in entry]
    if not names:
        return
    name = chance.choice(names)
    entry = header[name] = dict(header[name])
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    match chance.randrange(10):
        case 0:
            entry["dtype"] = chance.choice(DTYPES)
        case 1 if isinstance(shape, list):
            entry["shape"] = chance.choice(
                (shape[::-1], [*shape, 1], [1, *shape], shape[:1], [], shape * 40, [0, *shape], [1 << 40] * 3)
            )
        case 2 if isinstance(offsets, list):
            entry["data_offsets"] = chance.choice(
                (offsets[::-1], [0, size], [size, size], [0, 0], offsets * 2)
            )
        case 3 if isinstance(offsets, list):
            entry["data_offsets"] = [chance.choice(NUMBERS), offsets[-1:]][:: chance.choice((1, -1))]
        case 4:
            header[name + chance.choice((".rotary_emb.inv_freq", "\0", " ", ".bias"))] = entry
        case 5:
            header[weird_text(chance, 200_000)] = header.pop(name)
        case 6:
            other = chance.choice(names)
            header[name], header[other] = header[other], entry  # two tensors exchange their places
        case 7:
            shift = chance.choice((1, -1, 2, 64, 4096))
            for moved in names:
                if isinstance(span := header[moved].get("data_offsets"), list):
                    ours = [x + shift if isinstance(x, int) else x for x in span]
                    header[moved] = header[moved] | {"data_offsets": ours}
        case 8:
            header["__metadata__"] = chance.choice(
                (None, [], {"a": 1}, {"format": weird_text(chance)}, {weird_text(chance): "x"}, "pt")
            )
        case _:
            del header[name]
