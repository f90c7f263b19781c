"""Tensors of safetensors files that have no place in Mixtral's parameters as they are."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from model.checkpoint.load import read_bytes
from model.checkpoint.names import Rows, Table, stored_tensors
from model.checkpoint.pieces import Piece
from model.checkpoint.safetensors import DTYPES, TensorEntry, readable
from model.config import ModelConfig
from model.errors import ModelError, quoted
from model.parameters import GATE
from tools.quantize.names import copied_from
from tools.quantize.sources.source import Extent, ModelFiles

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


class Part(Protocol):
    """Rows of a parameter, as files have them."""

    @property
    def extents(self) -> list[Extent]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class PartsSource:
    """A source whose parameters are made up of parts: see `source.Source`.

    parts    of each parameter, in the order of their rows
    dtype    of what the output does not quantize
    program  which wrote the files
    lossy    what quantized the weights
    """

    files: ModelFiles
    config: ModelConfig
    parts: Mapping[str, Sequence[Part]]
    dtype: torch.dtype
    program: str
    lossy: str

    @property
    def gates(self) -> torch.dtype:
        gates = (parts for name, parts in self.parts.items() if name.endswith(GATE))
        return widest(part.dtype for parts in gates for part in parts)

    @property
    def description(self) -> str:
        total, count = sum(map(self.size, self.parts)), len(self.files.paths)
        return f"{self.program}, {count} file{'s' * (count > 1)}, {readable(total)}"

    @property
    def tokenizer(self) -> Mapping[str, Path | bytes]:
        return copied_from(self.files.folder)

    def size(self, parameter: str) -> int:
        return sum(stop - start for _, start, stop in self.extents(parameter))

    def extents(self, parameter: str) -> Collection[Extent]:
        return [extent for part in self.parts[parameter] for extent in part.extents]

    def read(self, parameter: str, device: torch.device) -> Tensor:
        read = [part.read().to(device) for part in self.parts[parameter]]
        return torch.cat(read) if len(read) > 1 else read[0]


def plain(path: Path, entry: TensorEntry, name: str, shape: tuple[int, ...]) -> Plain:
    if entry.shape != shape or entry.dtype not in FLOATS:
        raise ModelError(
            f"{path}: tensor {quoted(name)} is {entry.dtype} {quoted(list(entry.shape))}, and must be "
            f"{' or '.join(FLOATS)} {list(shape)}"
        )
    return Plain(path, name, entry)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds the numbers of all of these."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 else torch.float32
