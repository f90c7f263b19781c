"""Sparse mixture of experts: the router chooses A of E experts for each token, and their outputs are summed.

A layer asks its experts through the protocol `Experts`. `ResidentExperts` have ordinary parameters. An expert
cache, which keeps only some experts on the device, obeys the same protocol. Both sum with the same
`Contributions`, so they give the same bits.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear
from model.router import Choice, Router
from model.rows import apart

Product = Callable[[Tensor], Tensor]  # x [N, inputs] -> [N, outputs]


class Experts(Protocol):
    """One layer's experts."""

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        x and the result are [N, D] in the model's dtype. A token's contributions are added in ascending order
        of expert, so the result does not depend on which expert's weights arrived first.
        """
        ...


class StepExperts(Experts, Protocol):
    """Experts that `Mixtral.step` can use on a GPU."""

    def step(self, x: Tensor, choice: Choice) -> Tensor:
        """The same for one token, x [1, D] -> [1, D], without waiting for the device."""
        ...

    @property
    def rest(self) -> Callable[[Tensor], Tensor] | None:
        """If `step` may leave out some experts, because the host computes them meanwhile: what adds them to
        its result, [1, D] -> [1, D]."""
        ...


def gated(x: Tensor, w13: Product) -> Tensor:  # [N, D] -> [N, F]
    """An expert's inner values, `silu(w1 x) * w3 x` (arXiv 2002.05202). `w13` multiplies by w1 above w3."""
    gate, up = w13(x).chunk(2, dim=-1)  # [N, F] each
    return F.silu(gate) * up


class Expert(nn.Module):
    """One expert with parameters: SwiGLU, `w2(silu(w1 x) * w3 x)`."""

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

    def forward(self, x: Tensor, choice: Choice) -> Tensor:  # [N, D] -> [N, D]
        return mix(self.experts, x, choice)


def mix(experts: Sequence[Product], x: Tensor, choice: Choice) -> Tensor:  # [N, D] -> [N, D]
    """What `Experts` promises, with all experts of the layer on the device."""
    sums: Contributions
    if x.shape[0] == 1:
        ids = choice.ids.tolist()[0]
        sums, order = OneToken(x, choice, ids), sorted(ids)
    else:
        counts = torch.bincount(choice.ids.flatten(), minlength=len(experts)).tolist()
        sums = ManyTokens(x, choice, counts)
        order = list(sums.groups)
    for e in order:
        rows = sums.inputs(e)
        sums.add(e, apart(experts[e], rows) if choice.apart else experts[e](rows))
    return sums.total()


class Contributions(Protocol):
    """What a layer's experts add to its output.

    The caller computes experts in any order. Their contributions are added in ascending order of expert, so
    every order gives the same bits.
    """

    def inputs(self, expert: int) -> Tensor:  # [n, D]
        """The rows of x whose router chose the expert."""
        ...

    def add(self, expert: int, y: Tensor) -> None:  # [n, D]
        """Take the expert's outputs for its inputs."""
        ...

    def total(self) -> Tensor:  # [N, D]
        """The sum, after every chosen expert has been added."""
        ...


class OneToken:
    """Contributions to one token. It gathers and scatters nothing, because decoding spends its time here."""

    def __init__(self, x: Tensor, choice: Choice, ids: list[int]) -> None:
        """x is [1, D]. `ids` are the ids of the choice, on the host."""
        self.x, self.ids = x, ids
        self.weights = choice.weights.to(x.dtype).unbind(1)  # A of [1]
        self.parts: dict[int, Tensor] = {}

    def inputs(self, expert: int) -> Tensor:
        return self.x

    def add(self, expert: int, y: Tensor) -> None:
        self.parts[expert] = y * self.weights[self.ids.index(expert)]

    def total(self) -> Tensor:
        first, *rest = (self.parts[expert] for expert in sorted(self.parts))
        return sum(rest, first)


class ManyTokens:
    """Contributions to several tokens. Each is held until those of all lower experts have been added.

    >>> x, ids = torch.ones(2, 4), torch.tensor([[3, 1], [1, 0]])
    >>> sums = ManyTokens(x, Choice(ids, torch.tensor([[0.75, 0.25], [0.5, 0.5]])), counts=[1, 2, 0, 1])
    >>> for e in (3, 0, 1):
    ...     sums.add(e, sums.inputs(e) * e)
    >>> sums.total()[:, 0]  # 1 * 0.25 + 3 * 0.75, and 0 * 0.5 + 1 * 0.5
    tensor([2.5000, 0.5000])
    """

    def __init__(self, x: Tensor, choice: Choice, counts: Sequence[int]) -> None:
        """x is [N, D]. `counts` [E] has the number of tokens that chose each expert."""
        self.x, self.weights = x, choice.weights.to(x.dtype)
        self.groups = {e: (rows, column) for e, rows, column in by_expert(choice.ids, counts)}
        self.pending = deque(self.groups)  # ascending: experts whose contributions are not in `out` yet
        self.held: dict[int, Tensor] = {}
        self.out = torch.zeros_like(x)

    def inputs(self, expert: int) -> Tensor:
        return self.x[self.groups[expert][0]]

    def add(self, expert: int, y: Tensor) -> None:
        rows, column = self.groups[expert]
        self.held[expert] = y * self.weights[rows, column, None]
        while self.pending and self.pending[0] in self.held:
            e = self.pending.popleft()
            self.out.index_add_(0, self.groups[e][0], self.held.pop(e))

    def total(self) -> Tensor:
        assert not self.pending, self.pending
        return self.out


def by_expert(ids: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:  # ids [N, A]
    """For each chosen expert, in ascending order: (expert, rows [n], column [n]).

    `rows` are the tokens that chose the expert, ascending. `column` says which of a token's A choices it is.
    `counts` [E] has the number of tokens that chose each expert. It is on the host, so that nothing here
    waits for the device.

    >>> ids = torch.tensor([[2, 0], [2, 1]])  # token 0 chose experts 2 and 0, token 1 chose 2 and 1
    >>> groups = by_expert(ids, counts=[1, 1, 2, 0])
    >>> [(e, rows.tolist(), column.tolist()) for e, rows, column in groups]
    [(0, [0], [1]), (1, [1], [1]), (2, [0, 1], [0, 0])]
    """
    A = ids.shape[1]
    order = ids.flatten().argsort(stable=True)  # [N * A]
    groups = zip((order // A).split(list(counts)), (order % A).split(list(counts)), strict=True)
    for e, (rows, column) in enumerate(groups):
        if counts[e]:
            yield e, rows, column


class SparseMoE(nn.Module):
    """A router and the experts that it chooses from."""

    def __init__(self, config: ModelConfig, experts: Experts, device: torch.device) -> None:
        super().__init__()
        self.gate = Router(config, device)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        flat = x.flatten(0, 1)  # [N, D], N = B * T
        return self.experts(flat, self.gate(flat)).view(x.shape)

    def decode(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        """The same for one token of each of N texts."""
        return self.experts(x, self.gate(x, each=True))
