"""Finds the files of a folder that are the checkpoint's weights, without reading them."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from model.checkpoint.foreign import CONVERT, GGUF, STEMS
from model.config import read_json
from model.errors import ModelError, quoted

SHARD = re.compile(r"(?P<stem>[a-z]+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
MAX_INDEX_BYTES = 16 << 20  # a line a tensor; other programs' quantized models have thousands
INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `folder`, in the order of their names. Raises as
    `weight_names` does."""
    check_folder(folder)
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return [folder / name for name in weight_names(folder, names, folder)]


def weight_names(model: Path | str, names: Collection[str], folder: Path) -> list[str]:
    """Of a checkpoint's files those with weights. `names` are all of them, and the index is in `folder`.

    For each stem this looks for one whole file, then for the shards that an index lists, then for numbered
    shards without an index. Raises `ModelError` if a shard is missing, or if there are no readable weights.
    """
    for stem in STEMS:
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
        if f"{stem}{INDEX}" in names:
            return indexed_shards(folder / f"{stem}{INDEX}", names)
        if shards := numbered_shards(model, names, stem):
            return shards
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise ModelError(
            f"{model}: the weights are pickles ({some(pickles)}), which run code when opened and are "
            "never read; download or convert to safetensors"
        )
    raise ModelError(
        f"{model}: no weights (model.safetensors or consolidated.safetensors, whole or in shards)"
    )


def check_folder(folder: Path) -> None:
    """Raises `ModelError` unless `folder` is a folder that is not empty."""
    if not folder.exists():
        raise ModelError(f"{folder}: no such folder")
    if not folder.is_dir() and folder.suffix.lower() == GGUF:
        raise ModelError(f"{folder}: a GGUF file; {CONVERT.format(folder)}")
    if not folder.is_dir():
        raise ModelError(f"{folder}: a file; a checkpoint is a folder with a configuration and weights in it")
    if not any(folder.iterdir()):
        raise ModelError(f"{folder}: empty; a checkpoint is a folder with a configuration and weights in it")


def indexed_shards(index: Path, names: Collection[str]) -> list[str]:
    """The shards that an index's `weight_map` {tensor: file} lists.

    Raises `ModelError` unless all of them are among `names`.
    """
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no weight_map of tensors to files")
    for tensor, name in weight_map.items():
        if not is_plain_name(name):
            raise ModelError(
                f"{index}: tensor {quoted(tensor)} is in {quoted(name)}, which is not a file name"
            )
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if name not in names]
    if missing:
        raise ModelError(
            f"{index}: {len(missing)} of {len(shards)} shards missing ({some(missing)}); download again"
        )
    return shards


def is_plain_name(name: Any) -> bool:
    """Whether `name` is the name of a safetensors file, without a path.

    >>> is_plain_name("model-00001-of-00002.safetensors")
    True
    >>> any(map(is_plain_name, ["../a.safetensors", "/a.safetensors", "b\\\\a.safetensors", "", ".", 3]))
    False
    """
    return isinstance(name, str) and re.fullmatch(r"[\w.+-]{1,240}\.safetensors", name, re.ASCII) is not None


def numbered_shards(model: Path | str, names: Collection[str], stem: str) -> list[str]:
    """All shards like `stem-00001-of-00003.safetensors`, if there are any. Raises `ModelError` if some are
    missing."""
    found = {name: match for name in names if (match := SHARD.fullmatch(name)) and match["stem"] == stem}
    counts = {int(match["count"]) for match in found.values()}
    if len(counts) > 1:
        raise ModelError(f"{model}: shards of different exports, of {some(sorted(counts))} files")
    for count in counts:
        every = (f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
        missing = [name for name in every if name not in found]
        if missing:
            raise ModelError(
                f"{model}: {len(missing)} of {count} shards missing ({some(missing)}); download again"
            )
    return sorted(found)


def some(names: Sequence[object], limit: int = 3) -> str:
    """List the first few of many names, for a message.

    >>> print(some(["a", "b", "c", "d\\n", "e"]))
    'a', 'b', 'c' and 2 more
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(quoted, names[:limit])) + more
