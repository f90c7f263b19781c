"""Writes a safetensors file as a stream: the caller declares all tensors first, and then gives one at a time.

This takes the memory of one tensor. The file has another name until it is complete and on the disk, so a
failure before then leaves nothing that could be mistaken for it.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from model.checkpoint.safetensors import NAMES, byte_view

DATA_ALIGNMENT = 4096  # bytes: the first tensor starts on a page


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """A file that is being written, as a context manager.

        with Writer(path, [TensorSpec("a", torch.float32, (2, 3)), ...]) as writer:
            writer.write("a", a)  # in the order of the specs
            ...

    Leaving the block puts the file in place, and replaces a file of that name. An exception in the block
    removes what was written. So does a missing tensor, which raises `ValueError`. A killed process leaves
    `path.part`. `written` is called with all bytes of the file, in order: it may be a digest's `update`.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        written: Callable[[bytes | memoryview], object] = lambda data: None,
    ) -> None:
        header = encode_header(specs, metadata or {})
        self.path = path
        self.written = written
        self.remaining = list(reversed(specs))
        self.place = replacing(path)
        self.file = self.place.__enter__()
        self.append(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. Raises `ValueError` if it is not the one that the specs have next."""
        if not self.remaining:
            raise ValueError(f"{name!r} comes after the last tensor of {self.path}")
        given, spec = TensorSpec(name, tensor.dtype, tuple(tensor.shape)), self.remaining[-1]
        if given != spec:
            raise ValueError(f"{self.path}: expected {spec}, was given {given}")
        values = tensor.detach().to("cpu").contiguous()
        self.append(byte_view(values))
        self.remaining.pop()

    def append(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.written(data)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or not self.remaining:
            self.place.__exit__(kind, error, trace)
            return
        missing = ValueError(f"{self.path}: {len(self.remaining)} tensors have not been written")
        self.place.__exit__(ValueError, missing, None)
        raise missing


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The header's length and JSON, padded with spaces. Raises `ValueError` if a name occurs twice.

    >>> len(encode_header([TensorSpec("a", torch.float32, (2, 3))], {}))
    4096
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.name in entries or spec.name == "__metadata__":
            raise ValueError(f"a tensor cannot be named {spec.name!r}: the name is taken")
        end = offset + spec.bytes
        entries[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_text(path: Path, text: str) -> None:
    """Write a small text file, completely or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a small file, completely or not at all."""
    with replacing(path) as file:
        file.write(contents)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the name `path` once it is complete and on the disk.

    It replaces a file of that name. An exception in the block removes what was written.
    """
    part = part_of(path)
    try:
        with create(part) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """The name of a file until it is complete."""
    return path.with_name(path.name + ".part")


def create(path: Path) -> BinaryIO:
    """Open a new file for writing. This removes a file of that name, or a link but not what it leads to."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # O_EXCL follows no links
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def put_in_place(part: Path, path: Path) -> None:
    """Rename a file, and make the rename survive a power cut if the system can."""
    os.replace(part, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
