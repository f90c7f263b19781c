"""Checkpoints of 16 or 32 bits, in HF's or Mistral's layout."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.checkpoint.load import checkpoint_of
from model.config import ModelConfig
from model.errors import ModelError
from model.parameters import GATE
from tools.quantize.names import copied_from
from tools.quantize.sources.source import Extent, ModelFiles
from tools.quantize.sources.stored import widest


@dataclass(frozen=True)
class FolderSource:
    """See `source.Source`."""

    files: ModelFiles
    checkpoint: Checkpoint
    lossy: str | None = None

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.checkpoint.dtype
        return dtype if dtype.itemsize == 2 else torch.bfloat16

    @property
    def gates(self) -> torch.dtype:
        pieces = self.checkpoint.layout.pieces
        return widest([piece.dtype for piece in pieces if piece.rows.parameter.endswith(GATE)])

    @property
    def description(self) -> str:
        return self.checkpoint.description

    @property
    def tokenizer(self) -> Mapping[str, Path | bytes]:
        return copied_from(self.files.folder)

    def size(self, parameter: str) -> int:
        return sum(stop - start for _, start, stop in self.extents(parameter))

    def extents(self, parameter: str) -> Collection[Extent]:
        pieces = self.checkpoint.layout.filling([parameter])
        return [(piece.path, piece.offset, piece.offset + piece.bytes) for piece in pieces]

    def read(self, parameter: str, device: torch.device) -> Tensor:
        return self.checkpoint.read(parameter, device)


def open_folder(files: ModelFiles) -> FolderSource:
    """Check configuration, names, shapes and dtypes. Raises `ModelError` if the weights are not those of a
    Mixtral, or are quantized."""
    checkpoint = checkpoint_of(files.folder, files.headers)
    if checkpoint.native:
        raise ModelError(f"{files.folder}: quantized already ({checkpoint.description}); start from 16 bits")
    return FolderSource(files, checkpoint)
