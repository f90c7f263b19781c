"""What each expert adds to a layer's output, kept apart until all are there."""

import numpy as np
import torch
from torch import Tensor

from model.moe import by_expert


class Contributions:
    """The sums that `model.moe.mix` makes, bit for bit, of experts that are computed in any order.

    >>> x, weights, ids = torch.ones(1, 4), torch.tensor([[0.75, 0.25]]), torch.tensor([[3, 1]])
    >>> sums = Contributions(x, weights, ids, chosen=ids.numpy(), experts=4)
    >>> for e in (3, 1):
    ...     sums.add(e, sums.inputs(e) * e)
    >>> sums.total()  # 1 * 0.25 + 3 * 0.75
    tensor([[2.5000, 2.5000, 2.5000, 2.5000]])
    """

    def __init__(self, x: Tensor, weights: Tensor, ids: Tensor, chosen: np.ndarray, experts: int) -> None:
        """x [N, D]; weights [N, A] in x's dtype; ids [N, A], the experts of each token, and the same on the
        host. Does not wait for the device."""
        self.x, self.weights = x, weights
        self.parts: dict[int, Tensor] = {}  # by expert
        self.one: list[int] | None = chosen[0].tolist() if len(chosen) == 1 else None
        self.groups: dict[int, tuple[Tensor, Tensor]] = {}
        if self.one is None:
            counts = np.bincount(chosen.ravel(), minlength=experts).tolist()
            self.groups = {e: (rows, choice) for e, rows, choice in by_expert(ids, counts)}

    def inputs(self, expert: int) -> Tensor:  # [n, D]
        """The rows of x that chose the expert."""
        return self.x if self.one else self.x[self.groups[expert][0]]

    def add(self, expert: int, y: Tensor) -> None:  # [n, D]
        """What the expert makes of its inputs."""
        if self.one:
            self.parts[expert] = y * self.weights[:, self.one.index(expert)]
        else:
            rows, choice = self.groups[expert]
            self.parts[expert] = y * self.weights[rows, choice, None]

    def total(self) -> Tensor:  # [N, D]
        """All of them, added in ascending order of expert."""
        if self.one:
            parts = [self.parts[expert] for expert in sorted(self.parts)]
            return sum(parts[1:], parts[0])
        out = torch.zeros_like(self.x)
        for expert in sorted(self.parts):
            out.index_add_(0, self.groups[expert][0], self.parts[expert])
        return out
