"""The tensors of an output, made from weights of 16 or 32 bits."""

import math
from concurrent.futures import Executor

import torch
from torch import Tensor

from model.checkpoint.native import StoredParameter
from model.errors import ModelError
from model.quant.solve import quantize
from tools.quantize.sources.source import Source


def from_weights(
    source: Source, device: torch.device, parameter: StoredParameter, pool: Executor
) -> tuple[list[Tensor], float | None]:
    """One parameter's tensors, and the relative error of quantizing it. What is not quantized has none.

    Raises `ModelError` if weights are not finite, or too large for the format.
    """
    weight = source.read(parameter.name, device)
    if not parameter.spec.quantized:
        return [converted(parameter.name, weight, parameter.tensors[0].dtype)], None
    made, error = quantize(weight, parameter.spec, parameter.matrix, pool)
    if not math.isfinite(error):
        raise ModelError(f"{parameter.matrix}: has weights too large to quantize")
    return list(made.streams().values()), error


def converted(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype. Raises `ModelError` if any of it is not finite there."""
    made = weight.to(dtype)
    if torch.isfinite(made).all():
        return made
    if torch.isfinite(weight).all():
        raise ModelError(f"{name}: has weights too large for {str(dtype).removeprefix('torch.')}")
    raise ModelError(f"{name}: has weights that are not finite numbers; the source is damaged")
