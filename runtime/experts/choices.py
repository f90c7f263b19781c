"""What a layer's router chose for its tokens, as the host has to know it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What a forward needs of one layer."""

    layer: int
    experts: list[int]  # each once, in the order of access
    tokens: int
    per_token: int  # experts of each token
    ahead: list[list[int]]  # for each of the next layers its experts, likeliest first


def to_host(ids: Tensor, ranking: Tensor | None) -> tuple[np.ndarray, list[list[int]]]:
    """ids [N, A] and ranking [d, E] on the host, in one transfer.

    >>> to_host(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[2, 1, 0]]))
    (array([[2, 0],
           [1, 2]]), [[2, 1, 0]])
    """
    if ranking is None:
        return ids.cpu().numpy(), []
    both = torch.cat([ids.flatten(), ranking.flatten()]).cpu().numpy()
    return both[: ids.numel()].reshape(ids.shape), both[ids.numel() :].reshape(ranking.shape).tolist()


def by_last_use(chosen: np.ndarray, experts: int) -> list[int]:  # [N, A]
    """Each expert that any token chose once: those that the last tokens chose last; of one token ascending.

    >>> by_last_use(np.array([[3, 0], [1, 2], [2, 0]]), experts=5)
    [3, 1, 0, 2]
    """
    N, A = chosen.shape
    last = np.full(experts, -1)
    np.maximum.at(last, chosen.ravel(), np.arange(N).repeat(A))
    return sorted(np.flatnonzero(last >= 0).tolist(), key=lambda e: (last[e], e))


def added_up(chosen: np.ndarray, weights: Tensor, needed: Sequence[int]) -> list[float]:
    """For each needed expert, the weights [N, A] with which tokens chose it [N, A].

    >>> added_up(np.array([[3, 0], [1, 3]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), needed=[0, 1, 3])
    [0.25, 0.5, 1.25]
    """
    totals = np.bincount(chosen.ravel(), weights.flatten().tolist())
    return totals[list(needed)].tolist()
