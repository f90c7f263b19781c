"""Sparse mixture of experts: a router chooses A of E experts for each token, and somebody provides them.

Who that is, is behind `Experts`: here `ResidentExperts`, whose weights are ordinary parameters. A provider
that keeps only some experts on the device has the same contract and must give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear

Product = Callable[[Tensor], Tensor]  # x [N, inputs] -> [N, outputs]


class Experts(Protocol):
    """One layer's experts, applied to tokens that the router has already assigned."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted.

        x [N, D] in the model's dtype; ids [N, A] int64, the experts of each token, all different; weights [N,
        A] float32, adding up to 1. Returns [N, D] in x's dtype. A token's contributions are added in
        ascending order of expert id, so the result does not depend on the order in which weights became
        available.
        """
        ...


class Router(nn.Module):
    """Chooses experts: the A largest of E gate logits, softmax over those, in float32 (outside of autocast).

    The softmax of the chosen logits is the softmax over all E, cut to the chosen and renormalised to 1: the
    factor that renormalising divides out is common to all (arXiv 2401.04088, section 2.1).

    >>> _ = torch.manual_seed(0); logits = torch.randn(1, 8)
    >>> over_all = logits.softmax(-1).topk(2).values
    >>> torch.allclose(logits.topk(2).values.softmax(-1), over_all / over_all.sum())
    True
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.weight = nn.Parameter(
            torch.empty(config.experts, config.hidden, dtype=torch.float32, device=device)
        )

    def logits(self, x: Tensor) -> Tensor:  # [N, D] -> [N, E]
        return F.linear(x.float(), self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [N, D] -> ids [N, A], weights [N, A]
        chosen, ids = self.logits(x).topk(self.experts_per_token)
        return ids, chosen.softmax(-1)


def gated(x: Tensor, w13: Product) -> Tensor:  # [N, D] -> [N, F]
    """An expert's inner values, `silu(w1 x) * w3 x` (arXiv 2002.05202), with w1 above w3 in one matrix."""
    gate, up = w13(x).chunk(2, dim=-1)  # [N, F] each
    return F.silu(gate) * up


class Expert(nn.Module):
    """One expert, its weights parameters: SwiGLU, `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.w13 = Linear(config.hidden, 2 * config.ffn, dtype, device)
        self.w2 = Linear(config.ffn, config.hidden, dtype, device)

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        return self.w2(gated(x, self.w13))


class ResidentExperts(nn.Module):
    """All experts on the device, as parameters `0.w13.weight`, `0.w2.weight`, `1.w13.weight`, ..."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.experts = [Expert(config, dtype, device) for _ in range(config.experts)]
        for e, expert in enumerate(self.experts):
            self.add_module(str(e), expert)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # as `Experts`
        return mix(self.experts, x, ids, weights)


def mix(experts: Sequence[Product], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What `Experts` promises, where all experts of a layer are at hand."""
    weights = weights.to(x.dtype)
    if x.shape[0] == 1:
        return mix_one(experts, x, ids, weights)
    out = torch.zeros_like(x)  # [N, D]
    counts = torch.bincount(ids.flatten(), minlength=len(experts)).tolist()
    for e, rows, choice in by_expert(ids, counts):
        contribution = experts[e](x[rows]) * weights[rows, choice, None]  # [n, D]
        out.index_add_(0, rows, contribution)
    return out


def mix_one(experts: Sequence[Product], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # N = 1
    """The same sums without gathering or scattering: decoding spends its time here."""
    chosen = sorted(zip(ids.tolist()[0], weights.unbind(1), strict=True), key=lambda pair: pair[0])
    contributions = [experts[e](x) * weight for e, weight in chosen]
    return sum(contributions[1:], contributions[0])


def by_expert(ids: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:  # ids [N, A]
    """For each expert that any token chose, in ascending order: (expert, rows [n], choice [n]).

    `rows` are the tokens that chose it, ascending, and `choice` says as which of their A choices. `counts`
    says how many chose each of the experts: with it on the host, nothing here waits for the device.

    >>> ids = torch.tensor([[2, 0], [2, 1]])  # token 0 chose experts 2 and 0, token 1 chose 2 and 1
    >>> groups = by_expert(ids, counts=[1, 1, 2, 0])
    >>> [(e, rows.tolist(), choice.tolist()) for e, rows, choice in groups]
    [(0, [0], [1]), (1, [1], [1]), (2, [0, 1], [0, 0])]
    """
    A = ids.shape[1]
    order = ids.flatten().argsort(stable=True)  # [N * A]
    for e, (rows, choice) in enumerate(
        zip((order // A).split(list(counts)), (order % A).split(list(counts)), strict=True)
    ):
        if counts[e]:
            yield e, rows, choice


class SparseMoE(nn.Module):
    """A router and whoever provides its experts."""

    def __init__(self, config: ModelConfig, experts: Experts, device: torch.device) -> None:
        super().__init__()
        self.gate = Router(config, device)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        flat = x.flatten(0, 1)  # [N, D], N = B * T
        return self.experts(flat, *self.gate(flat)).view(x.shape)
