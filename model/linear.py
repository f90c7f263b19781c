"""The matrix product of the network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """`x @ weight.T`, without bias.

    The weight [outputs, inputs] is left as memory happens to be: drawing random numbers for 47 billion
    parameters that a checkpoint overwrites would take longer than reading it.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return F.linear(x, self.weight)
