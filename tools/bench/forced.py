"""Decoding with routing that a trace prescribes (`routing.py`), instead of what a random model would choose.

A decoded token takes the row of the trace at its position in the text, which is read on the device, so that
this may be part of a CUDA graph. Its weights come from the layer's own gate. A prompt routes by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.mixtral import Block
from model.moe import Router
from model.step import Choice
from runtime.experts.lookahead import Lookahead
from tools.bench.routing import guesses

Ahead = list[Tensor | None]  # of each layer [P, d, E] int64, d = min(distance, layers left)


@dataclass(frozen=True)
class Trace:
    """A trace on the model's device, with what lookahead gates shall have said of it."""

    choices: Tensor  # [P, L, A] int64
    ahead: Ahead
    distance: int  # layers that anybody looks ahead

    @staticmethod
    def make(choices: Tensor, experts: int, distance: int, device: torch.device) -> "Trace":
        """With rankings that find as much as the demo's gates do; none for a `distance` of 0."""
        L, ahead = choices.shape[1], []
        rankings = [guesses(choices, experts, d) for d in range(1, distance + 1)]
        for layer in range(L):
            later = [ranking[:, layer + d] for d, ranking in enumerate(rankings, 1) if layer + d < L]
            ahead.append(torch.stack(later, dim=1).to(device) if later else None)
        return Trace(choices.to(device), ahead, distance)


class TraceRouter(nn.Module):
    """Takes the place of a layer's router where a model is called as a whole."""

    def __init__(self, gate: Router, choices: Tensor, position: Tensor) -> None:
        """choices [P, A] int64, this layer's of a trace; position [1] int64, the caller's to move, below P.
        Both are on the gate's device."""
        super().__init__()
        self.gate, self.choices, self.position = gate, choices, position

    @property
    def weight(self) -> nn.Parameter:  # what lookahead gates are made of
        return self.gate.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [N, D] -> ids [N, A], weights [N, A]
        if x.shape[0] > 1:
            chosen: tuple[Tensor, Tensor] = self.gate(x)
            return chosen
        ids = self.choices.index_select(0, self.position)
        return ids, self.gate.logits(x).gather(1, ids).softmax(-1)


class TraceLookahead:
    """Takes the place of a `Lookahead`."""

    def __init__(self, own: Lookahead, ahead: Ahead, position: Tensor) -> None:
        self.own, self.ahead, self.position = own, ahead, position
        self.distance, self.gates = own.distance, own.gates

    def rank(self, layer: int, x: Tensor) -> Tensor | None:
        """As `Lookahead.rank` does: [d, E] int64, likeliest first; None behind the last layer."""
        ahead = self.ahead[layer]
        if ahead is None or x.shape[0] > 1:
            return self.own.rank(layer, x)
        return ahead.index_select(0, self.position)[0]


class TraceRoute:
    """A `model.step.Route`: takes the place of a decoder's router."""

    def __init__(self, blocks: Sequence[Block], trace: Trace, position: Tensor) -> None:
        """position [1] int64: where the decoder has on the device how many tokens there are."""
        self.gates = [block.block_sparse_moe.gate.weight for block in blocks]
        self.chosen, self.position = trace.choices.shape[2], position
        self.rows = []  # of each layer [P, A + d E] int32
        for layer, ahead in enumerate(trace.ahead):
            parts = [trace.choices[:, layer]] + ([] if ahead is None else [ahead.flatten(1)])
            self.rows.append(torch.cat(parts, dim=1).int())

    def __call__(self, layer: int, x: Tensor) -> Choice:  # x [1, D]
        row = self.rows[layer].index_select(0, self.position)[0]  # [A + d E]
        gates = self.gates[layer].index_select(0, row[: self.chosen])  # [A, D]
        weights = (gates * x).sum(-1).softmax(-1)  # [A] float32
        return Choice.split(torch.cat([weights.view(torch.int32), row]), self.chosen)
