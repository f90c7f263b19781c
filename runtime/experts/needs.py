"""What a layer needs, known to the host: which experts, in which order, and what the next layers expect."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass  # not frozen: a frozen one takes five times as long to make, and every layer makes one
class Needs:
    """The experts that one layer of a forward needs."""

    layer: int
    experts: list[int]  # each once, in the order in which the slot table is asked for them
    tokens: int
    per_token: int  # experts that each token chose
    ahead: list[list[int]]  # the experts of each of the next layers, likeliest first
    shares: Callable[[], Sequence[float]]  # for a trace: the experts' weights, summed over the tokens


def to_host(ids: Tensor, ranking: Tensor | None) -> tuple[np.ndarray, list[list[int]]]:
    """Bring ids [N, A] and ranking [d, E] to the host in one transfer.

    >>> to_host(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[2, 1, 0]]))
    (array([[2, 0],
           [1, 2]]), [[2, 1, 0]])
    """
    if ranking is None:
        return ids.cpu().numpy(), []
    both = torch.cat([ids.flatten(), ranking.flatten()]).cpu().numpy()
    return both[: ids.numel()].reshape(ids.shape), both[ids.numel() :].reshape(ranking.shape).tolist()


def by_last_use(chosen: np.ndarray, experts: int) -> list[int]:  # [N, A]
    """The chosen experts, each once. Those that the last tokens chose come last. One token's ascend.

    >>> by_last_use(np.array([[3, 0], [1, 2], [2, 0]]), experts=5)
    [3, 1, 0, 2]
    """
    N, A = chosen.shape
    last = np.full(experts, -1)
    np.maximum.at(last, chosen.ravel(), np.arange(N).repeat(A))
    return sorted(np.flatnonzero(last >= 0).tolist(), key=lambda e: (last[e], e))


def added_up(chosen: np.ndarray, weights: Tensor, needed: Sequence[int]) -> list[float]:
    """For each needed expert, the sum of the weights [N, A] with which tokens chose it.

    >>> added_up(np.array([[3, 0], [1, 3]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), needed=[0, 1, 3])
    [0.25, 0.5, 1.25]
    """
    totals = np.bincount(chosen.ravel(), weights.flatten().tolist())
    return totals[list(needed)].tolist()
