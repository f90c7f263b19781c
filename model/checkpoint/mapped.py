"""A checkpoint's files as memory: tensors that are views of read-only mappings.

The system reads a page of a mapping when it is first used, keeps it while it has memory to spare, and shares
it between processes. So loading reads nothing, and a model may be larger than memory.

A mapping shows what its file holds now. A file that is deleted, or replaced by another of its name, stays as
it was for those who have mapped it. `MappedFiles.check` finds a file that was written to or cut short. It
cannot help a thread that reads beyond the end of a file in that moment: the system ends its process (SIGBUS).
"""

import errno
import mmap
import os
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.checkpoint.pieces import Layout, Piece
from model.errors import ModelError, quoted
from model.quant.streams import STREAM_ALIGNMENT, Field

READ = "--no-map reads it into memory instead"
AGAIN = "load the model again"


class MappedFiles:
    """Read-only mappings of a checkpoint's files, each made when one of its tensors is first asked for."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.files: dict[Path, MappedFile] = {}
        self.bytes = 0  # that tensors were asked for

    def run(self, names: Iterable[str]) -> Tensor:
        """The tensors of these names as one run of bytes [uint8]. See `in_runs`.

        Never write to it: that would end the process. The mapping lives as long as a view of it. Raises
        `ModelError` if the file cannot be mapped, or has become too short.
        """
        pieces = self.layout.filling(names)
        path, start, end = pieces[0].path, pieces[0].offset, pieces[-1].offset + pieces[-1].bytes
        assert end - start == sum(piece.bytes for piece in pieces), pieces[0].tensor
        if path not in self.files:
            self.files[path] = MappedFile(path)
        self.bytes += end - start
        return self.files[path].memory(pieces)[start:end]

    def check(self) -> None:
        """Raises `ModelError` if a file is no longer what it was when it was mapped."""
        for file in self.files.values():
            try:
                now = file.state()
            except OSError as error:  # a network's file may be gone
                raise ModelError(
                    f"{file.path}: cannot be read any more ({error.strerror}); {AGAIN}"
                ) from error
            if now != file.mapped:
                raise ModelError(f"{file.path}: {difference(file.mapped, now)}; {AGAIN}")

    def close(self) -> None:
        """Close the files. Their memory is given back with the last tensor that views it."""
        for file in self.files.values():
            file.close()
        self.files.clear()


class MappedFile:
    """One file, its bytes, and what the system said of it when it was mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as on_error:
            try:
                file = on_error.enter_context(path.open("rb", buffering=0))
                self.descriptor = file.fileno()
                self.mapped = self.state()
                mapping = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError, OverflowError) as error:  # also an empty file, or one of 2^63 bytes
                reason = getattr(error, "strerror", None) or error
                no_room = getattr(error, "errno", None) == errno.ENOMEM
                remedy = "raise the limit of address space (ulimit -v)" if no_room else READ
                raise ModelError(f"{path}: cannot be mapped ({reason}); {remedy}") from error
            on_error.pop_all()
        self.close = weakref.finalize(self, file.close)
        self.bytes = torch.from_numpy(np.asarray(Lent(mapping)))

    def state(self) -> tuple[int, int]:
        """The file's size, and when it was last written to."""
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def memory(self, pieces: list[Piece]) -> Tensor:
        """The whole file. Raises `ModelError` if it ends before these pieces do."""
        for piece in pieces:
            if missing := max(piece.offset + piece.bytes - len(self.bytes), 0):
                raise ModelError(
                    f"{self.path}: ended {missing} bytes early, in tensor {quoted(piece.tensor)}; "
                    "did it change?"
                )
        return self.bytes


def difference(before: tuple[int, int], now: tuple[int, int]) -> str:
    """What has become of a file, from its states.

    >>> print(difference((9, 1), (5, 2)), difference((9, 1), (9, 2)), sep="; ")
    had 9 bytes when it was mapped and has 5 now; was written to after it was mapped
    """
    if before[0] != now[0]:
        return f"had {before[0]} bytes when it was mapped and has {now[0]} now"
    return "was written to after it was mapped"


class Lent:
    """Lends a read-only mapping to numpy as memory that can be written.

    PyTorch has no tensors that are read-only, and would warn of the array.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        array = np.frombuffer(mapping, dtype=np.uint8)
        self.mapping = mapping  # as long as an array needs it
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def in_runs(layout: Layout, fields: Iterable[Field]) -> bool:
    """Whether every matrix of `fields` is one run of bytes in a file, and every expert as well.

    `fields` are all tensors of a model, in order. A run begins on a multiple of `STREAM_ALIGNMENT`, and its
    tensors have the dtypes and distances of the fields. Files are so as `tools.quantize` writes them.
    """
    for _, group in groupby(fields, key=lambda field: run_name(field.name)):
        run = list(group)
        pieces = [layout.pieces[layout.places[field.name][0]] for field in run]
        if pieces[0].offset % STREAM_ALIGNMENT:
            return False
        for piece, field in zip(pieces, run, strict=True):
            moved = piece.offset - pieces[0].offset != field.offset - run[0].offset
            if moved or piece.path != pieces[0].path or piece.dtype != field.dtype:
                return False
    return True


def run_name(name: str) -> str:
    """What the names of a run's tensors begin with.

    >>> run_name("layers.0.self_attn.o_proj.codes")
    'layers.0.self_attn.o_proj'
    >>> run_name("layers.0.block_sparse_moe.experts.3.w13.codes")
    'layers.0.block_sparse_moe.experts.3'
    """
    matrix = name.rpartition(".")[0]
    return matrix.rpartition(".")[0] if ".experts." in matrix else matrix
