"""What a model has to give, so that `tools.quantize` can make a native checkpoint of it."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from model.checkpoint.safetensors import Header
from model.config import ModelConfig

SAMPLE = 1 << 16  # bytes from the middle of each file
HEAD = 1 << 20  # bytes from the beginning, where headers are

Extent = tuple[Path, int, int]  # bytes of a file: the first, and the one after the last
Bring = Callable[[Collection[Extent]], None]


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model: small ones in `folder`, and weights in `paths`.

    name         of the model
    headers      those of the weight files that are safetensors files, checked against the files' sizes
    fingerprint  gives a digest that other files would not have
    bring        puts bytes of weight files in place before they are read, and may take away all others. The
                 files of a folder are there, so nothing is done
    origin       of files that are at the hub: `org/name@revision at COMMIT`
    """

    name: str
    folder: Path
    paths: Sequence[Path]
    headers: Mapping[Path, Header]
    fingerprint: Callable[[], str]
    bring: Bring = lambda extents: None
    origin: str = ""

    @staticmethod
    def of_folder(folder: Path, paths: Sequence[Path], headers: Mapping[Path, Header]) -> "ModelFiles":
        """Files that are on the disk."""
        return ModelFiles(folder.resolve().name, folder, paths, headers, partial(sampled, paths))


def sampled(paths: Sequence[Path]) -> str:
    """A digest of every file's name, size, beginning and middle."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(HEAD))
            file.seek(max(HEAD, (HEAD + size) // 2 - SAMPLE // 2))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


class Source(Protocol):
    """A model to quantize. It gives one parameter of `Mixtral` at a time, and keeps none.

    Parameters have the names of `model.parameters.parameter_rows`, so q, k and v are one, and w1 and w3.
    A source is opened by a function that raises `ModelError` if the model cannot be used. So do its methods
    if a file cannot be read.
    """

    @property
    def files(self) -> ModelFiles: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> torch.dtype:
        """float16 or bfloat16: that of what the output does not quantize."""
        ...

    @property
    def gates(self) -> torch.dtype:
        """float32, float16 or bfloat16: that of the routers' gates."""
        ...

    @property
    def description(self) -> str:
        """Like `HF, 19 files, bfloat16, 93 GB`."""
        ...

    @property
    def lossy(self) -> str | None:
        """What has quantized weights before, like `GGUF (Q4_K, Q6_K)`; None if they have 16 or 32 bits."""
        ...

    @property
    def tokenizer(self) -> Mapping[str, Path | bytes]:
        """The files beside the weights that go along, by the name that they get, or their contents: those of
        the tokenizer, and settings of generation. Raises `ModelError` for a tokenizer that cannot be read."""
        ...

    def size(self, parameter: str) -> int:
        """The number of bytes that the files spend on a parameter."""
        ...

    def extents(self, parameter: str) -> Collection[Extent]:
        """The bytes of weight files that `read` reads."""
        ...

    def read(self, parameter: str, device: torch.device) -> Tensor:
        """A parameter in its shape, in float16, bfloat16 or float32."""
        ...
