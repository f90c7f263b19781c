"""The matrix product of the network."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.rows import in_pieces


def linear(x: Tensor, weight: Tensor) -> Tensor:  # [..., inputs], [outputs, inputs] -> [..., outputs]
    """`x @ weight.T`."""
    if x.numel() == x.shape[-1] or x.dtype == torch.float32:  # the shortest way for one row
        return F.linear(x, weight)
    return in_pieces(partial(F.linear, weight=weight), x)


class Linear(nn.Module):
    """`x @ weight.T`, without bias.

    The weight [outputs, inputs] is left as memory happens to be: drawing random numbers for 47 billion
    parameters that a checkpoint overwrites would take longer than reading it.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return linear(x, self.weight)


class PackedLinear(nn.Module):
    """The same product from a bfloat16 weight in oneDNN's own order, on a CPU: the same bits, sooner.

    A row-major weight is brought into that order anew for every product. With one row of x that takes as long
    as the product: 32000 x 4096 took 20 ms, and from packed weights 12 (two cores).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return in_pieces(self.product, x)

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def pack(module: nn.Module) -> nn.Module:
    """`module`, or where it is a `Linear` that this processor has use for packing, one that is packed."""
    if isinstance(module, Linear) and packs(module.weight):
        return PackedLinear(module.weight.detach())
    return module


def packs(weight: Tensor) -> bool:
    """Whether this build of PyTorch can pack this weight, and its processor multiplies bfloat16.

    >>> packs(torch.zeros(2, 2))
    False
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(torch.ops.mkldnn, name) for name in names) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
