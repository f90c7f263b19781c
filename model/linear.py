"""The matrix product of the network."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.rows import in_pieces


def linear(x: Tensor, weight: Tensor) -> Tensor:  # [..., inputs], [outputs, inputs] -> [..., outputs]
    """`x @ weight.T`."""
    if x.numel() == x.shape[-1] or x.dtype == torch.float32:  # a short cut for decoding
        return F.linear(x, weight)
    return in_pieces(partial(F.linear, weight=weight), x)


class Linear(nn.Module):
    """`x @ weight.T`, without bias.

    The weight [outputs, inputs] is uninitialized, because drawing 47 billion random numbers would take longer
    than reading the checkpoint that overwrites them.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return linear(x, self.weight)


class PackedLinear(nn.Module):
    """The same product, bit for bit, on a CPU from a bfloat16 weight that is stored in oneDNN's order.

    oneDNN reorders a row-major weight for every product. With one row of x that takes nearly as long as the
    product itself. A weight of 32000 x 4096 took 20 ms, and 12 ms when packed (two cores).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return in_pieces(self.product, x)

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def pack(module: nn.Module) -> nn.Module:
    """A packed copy of `module` if it is a `Linear` that this processor can use so, else `module` itself."""
    if isinstance(module, Linear) and packs(module.weight):
        return PackedLinear(module.weight.detach())
    return module


def packs(weight: Tensor) -> bool:
    """Whether this build of PyTorch can pack the weight and the processor multiplies bfloat16.

    >>> packs(torch.zeros(2, 2))
    False
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(torch.ops.mkldnn, name) for name in names) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
