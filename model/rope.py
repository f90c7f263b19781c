"""Rotary position embedding (arXiv 2104.09864) in the rotate-half layout of HF checkpoints."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Rope:
    """A table of rotations by position. A forward takes the slice of the positions that it computes.

    Dimension i of a head turns together with dimension i + K/2, by `position * theta^(-2i/K)`:

        out[i]       = x[i]       * cos - x[i + K/2] * sin
        out[i + K/2] = x[i + K/2] * cos + x[i]       * sin

    Rolling a head by K/2 brings each dimension's partner to its place, and the table holds the minus. So a
    rotation is `x * cos + roll(x) * sin`.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:  # [T, K] each, the first half of sin negated
        self.cos = cos
        self.sin = sin

    @staticmethod
    def table(
        positions: int,
        head_dim: int,
        theta: float,
        dtype: torch.dtype,
        device: torch.device,
        factor: float = 1.0,
    ) -> "Rope":
        """The table for positions 0 to `positions` - 1. Computed in float32, then rounded to `dtype` once.

        Linear scaling divides all angles by `factor`.
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim  # [K/2]
        frequencies = 1.0 / theta**exponents / factor  # [K/2]; theta**-exponents would round differently
        angles = torch.outer(torch.arange(positions, device=device).float(), frequencies)  # [T, K/2]
        cos, sin = angles.cos(), angles.sin()
        return Rope(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))

    def at(self, start: int, stop: int) -> "Rope":
        """The rotations of positions `start` to `stop` - 1."""
        return Rope(self.cos[start:stop], self.sin[start:stop])

    def of(self, positions: Sequence[int]) -> "Rope":
        """The rotations of one token of each of N texts, at these positions: for x [N, H, 1, K]."""
        if len(positions) == 1:
            return self.at(positions[0], positions[0] + 1)
        rows = torch.tensor(positions, device=self.cos.device)
        return Rope(self.cos[rows][:, None, None], self.sin[rows][:, None, None])

    def __call__(self, x: Tensor) -> Tensor:  # [B, H, T, K] -> the same
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)
