"""Writing a safetensors file as a stream: what it will hold is declared first, then tensors come one by one.

Memory is that of one tensor. The file has another name until it is complete and on the disk, so whatever
happens before then leaves nothing that could be taken for it.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
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
    """A tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """A file being written; a context manager.

        with Writer(path, [TensorSpec("a", torch.float32, (2, 3)), ...]) as writer:
            writer.write("a", a)  # in the order of the specs
            ...

    Leaving the block puts the file in place, replacing one that is there. Leaving it by an exception removes
    what was written, and so does leaving it early: a missing tensor raises `ValueError`. A killed process
    leaves `path.part`.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        header = encode_header(specs, metadata or {})
        self.path = path
        self.part = part_of(path)
        self.remaining = list(reversed(specs))
        self.file = create(self.part)
        self.file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. Raises `ValueError` if another was to come, or another dtype or shape."""
        if not self.remaining:
            raise ValueError(f"{name!r} comes after the last tensor of {self.path}")
        given, spec = TensorSpec(name, tensor.dtype, tuple(tensor.shape)), self.remaining[-1]
        if given != spec:
            raise ValueError(f"{self.path}: expected {spec}, was given {given}")
        values = tensor.detach().to("cpu").contiguous()
        self.file.write(byte_view(values))
        self.remaining.pop()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self.remaining:
                    raise ValueError(f"{self.path}: {len(self.remaining)} tensors have not been written")
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                put_in_place(self.part, self.path)
        finally:
            try:
                self.file.close()  # may have to write, and fail
            finally:
                self.part.unlink(missing_ok=True)


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of the header, spaces up to the alignment. Raises `ValueError` for a name used twice.

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
    """Write a small text file so that it is there completely or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name once it is complete and on the disk, replacing one that is there.

    Leaving the block by an exception removes what was written.
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
    """What a file is called until it is complete."""
    return path.with_name(path.name + ".part")


def create(path: Path) -> BinaryIO:
    """A new file, open for writing. One of this name that is there is removed first, and where it was a link,
    what that leads to stays as it is."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # O_EXCL follows no links
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def put_in_place(part: Path, path: Path) -> None:
    """Rename, and make sure that the rename survives a power cut, where one can ask for that."""
    os.replace(part, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
