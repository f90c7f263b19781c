"""The types of GGUF's tensors: their sizes, and the weights that their bytes stand for.

The package `gguf` knows both. It is an extra, so it is imported where it is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from model.errors import ModelError

NEEDED = "gguf>=0.19,<0.20"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that are not quantized


@dataclass(frozen=True)
class Kind:
    """A type of tensor. A row is cut into blocks of `weights` weights, which take `bytes` bytes each."""

    name: str
    weights: int
    bytes: int


def package() -> Any:
    """The package `gguf`. Raises `ModelError` if it is not installed."""
    try:
        import gguf.quants
    except ModuleNotFoundError as error:
        raise ModelError(
            f"GGUF needs the package {error.name}, which is not installed; pip install '{NEEDED}'"
        ) from None
    return gguf


@cache
def kinds() -> Mapping[int, Kind]:
    """All types by the numbers that files have for them. Raises `ModelError` as `package` does."""
    sizes = package().GGML_QUANT_SIZES
    return {int(kind): Kind(kind.name, weights, size) for kind, (weights, size) in sizes.items()}


@cache
def readable_kinds() -> frozenset[str]:
    """The names of the types that `dequantize` takes."""

    def takes(kind: Kind) -> bool:
        try:
            dequantize(np.zeros((1, kind.bytes), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    return frozenset(kind.name for kind in kinds().values() if takes(kind))


def dequantize(rows: np.ndarray, kind: Kind) -> np.ndarray:  # uint8 [N, bytes of a row] -> float32 [N, K]
    """The weights of whole rows. Scales that are not finite numbers give weights that are not, either."""
    with np.errstate(all="ignore"):
        found: np.ndarray = package().quants.dequantize(rows, package().GGMLQuantizationType[kind.name])
    return found
