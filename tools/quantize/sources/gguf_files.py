"""Finds the GGUF files of a model, which may be split into parts like `name-00001-of-00003.gguf`.

The first part has all keys. Every part says which it is by the keys `split.no`, from 0 on, and `split.count`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.files import some
from model.checkpoint.foreign import GGUF, has_safetensors
from model.errors import ModelError, quoted
from tools.quantize.sources.gguf_header import GgufHeader, GgufTensor, read_gguf

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.ASCII)
MAX_PARTS = 1000
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class GgufFiles:
    """The files of one model: `keys` of the first, and the tensors of all, each with its file."""

    name: str
    paths: tuple[Path, ...]
    keys: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, GgufTensor]]


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, or a folder that has such files and no weights in safetensors."""
    if path.is_dir():
        names = [each.name for each in path.iterdir()]
        return not has_safetensors(names) and any(name.lower().endswith(GGUF) for name in names)
    return path.suffix.lower() == GGUF


def open_files(path: Path) -> GgufFiles:
    """Read the headers of all parts. `path` is one of them, or a folder with one model in GGUF.

    Raises `ModelError` if a part is missing or belongs to another model, or if the folder has several models.
    """
    if path.is_dir():
        path = only_model(path)
    paths = parts_of(path)
    headers = {part: read_gguf(part) for part in paths}
    first = headers[paths[0]]
    for place, (part, header) in enumerate(headers.items()):
        check_part(part, header, place, len(paths))
    tensors: dict[str, tuple[Path, GgufTensor]] = {}
    for part, header in headers.items():
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise ModelError(
                    f"{part}: tensor {quoted(name)} is in {tensors[name][0].name}, too; the parts belong to "
                    "different models"
                )
            tensors[name] = part, tensor
    total = first.keys.get(TENSORS, len(tensors))
    if len(paths) > 1 and total != len(tensors):
        raise ModelError(
            f"{paths[0]}: the {len(paths)} parts have {len(tensors)} tensors, and {TENSORS} is "
            f"{quoted(total)}; they belong to different models"
        )
    name = match["stem"] if (match := PART.fullmatch(path.name)) else path.stem
    return GgufFiles(name, tuple(paths), first.keys, tensors)


def only_model(folder: Path) -> Path:
    """The GGUF file, or the first part, of the only model in a folder."""
    models: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == GGUF:
            match = PART.fullmatch(path.name)
            models.setdefault(f"{match['stem']} of {match['count']}" if match else path.name, path)
    if len(models) > 1:
        names = [path.name for path in models.values()]
        raise ModelError(f"{folder}: {len(models)} models in GGUF ({some(names)}); give the path of one")
    return next(iter(models.values()))


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that a file belongs to, in order. Raises `ModelError` if some are missing."""
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_PARTS:
        raise ModelError(f"{path}: part {int(match['number'])} of {count} (limit {MAX_PARTS}); rename it")
    names = [f"{match['stem']}-{n:05d}-of-{count:05d}{path.suffix}" for n in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{path.parent}: {len(missing)} of {count} parts missing ({some(missing)}); download them again"
        )
    return [path.parent / name for name in names]


def has_gguf(path: Path) -> bool:
    """Whether a file is there, with all other parts of its model."""
    try:
        return bool(parts_of(path))
    except ModelError:
        return False


def check_part(path: Path, header: GgufHeader, place: int, count: int) -> None:
    """Raises `ModelError` unless a file says that it is the part that its name says."""
    number, parts = header.keys.get(NUMBER, 0), header.keys.get(COUNT, 1)
    if count == 1 and parts not in (0, 1):
        raise ModelError(
            f"{path}: one of {quoted(parts)} parts; put all of them into one folder, with names that end "
            "like -00001-of-00002.gguf"
        )
    if count > 1 and (number, parts) != (place, count):
        raise ModelError(
            f"{path}: says that it is part {quoted(number)} of {quoted(parts)}, counted from 0, and must be "
            f"{place} of {count}; download it again"
        )
