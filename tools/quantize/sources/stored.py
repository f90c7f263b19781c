"""Tensors of safetensors files that have no place in Mixtral's parameters as they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.load import read_bytes
from model.checkpoint.names import Rows, Table, stored_tensors
from model.checkpoint.pieces import Piece
from model.checkpoint.safetensors import DTYPES, TensorEntry
from model.config import ModelConfig
from model.errors import ModelError, quoted
from tools.quantize.sources.source import Extent

FLOATS = ("F16", "BF16", "F32")


def fills(table: Table, config: ModelConfig) -> dict[str, list[tuple[str, Rows]]]:
    """For every parameter the tensors that make it up, each with its rows, in the spelling of `table`."""
    found: dict[str, list[tuple[str, Rows]]] = {}
    for name, stored in stored_tensors(table, config).items():
        for rows in stored.fills:
            found.setdefault(rows.parameter, []).append((name, rows))
    return found


def extent_of(path: Path, entry: TensorEntry) -> Extent:
    """The bytes of a tensor."""
    return path, entry.offset, entry.offset + entry.bytes


def read_tensor(path: Path, name: str, entry: TensorEntry) -> Tensor:
    """Read one tensor, on the CPU. Raises `ModelError` if the file cannot be read, or has changed."""
    dtype = DTYPES[entry.dtype]
    tensor = torch.empty(entry.shape, dtype=dtype, device="cpu")
    read_bytes(Piece(path, name, entry.offset, dtype, Rows(name, 0, entry.shape)), tensor)
    return tensor


@dataclass(frozen=True)
class Plain:
    """A tensor of a file that is not quantized."""

    path: Path
    name: str
    entry: TensorEntry

    @property
    def extents(self) -> list[Extent]:
        return [extent_of(self.path, self.entry)]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]

    def read(self) -> Tensor:
        return read_tensor(self.path, self.name, self.entry)


def plain(path: Path, entry: TensorEntry, name: str, shape: tuple[int, ...]) -> Plain:
    if entry.shape != shape or entry.dtype not in FLOATS:
        raise ModelError(
            f"{path}: tensor {quoted(name)} is {entry.dtype} {quoted(list(entry.shape))}, and must be "
            f"{' or '.join(FLOATS)} {list(shape)}"
        )
    return Plain(path, name, entry)


def widest(dtypes: Mapping[str, torch.dtype] | list[torch.dtype]) -> torch.dtype:
    """The dtype that holds the numbers of all of these."""
    kinds = set(dtypes.values() if isinstance(dtypes, Mapping) else dtypes)
    return kinds.pop() if len(kinds) == 1 else torch.float32
