"""Decoding with routing that a trace prescribes (`routing.py`), instead of what a random model would choose.

A decoded token takes the row of the trace at its position in the text, which is read on the device, so that
this may be part of a CUDA graph. Its weights come from the layer's own gate. A prompt routes by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.router import Choice, Router
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
    """Takes the place of a layer's router: it chooses what a trace prescribes. A prompt routes by itself."""

    def __init__(self, gate: Router, trace: Trace, layer: int, position: Tensor) -> None:
        """position [1] int64, on the gate's device, is the caller's to move, below P."""
        super().__init__()
        self.gate, self.position = gate, position
        self.choices, self.ahead = trace.choices[:, layer].contiguous(), trace.ahead[layer]
        parts = [self.choices] + ([] if self.ahead is None else [self.ahead.flatten(1)])
        self.rows = torch.cat(parts, dim=1).int()  # [P, A + d E]

    @property
    def weight(self) -> nn.Parameter:
        return self.gate.weight

    @property
    def distance(self) -> int:
        return self.gate.distance

    def look_ahead(self, later: Sequence[Tensor]) -> None:
        self.gate.look_ahead(later)

    def prepare_step(self) -> None:
        """There is nothing to prepare: `rows` are."""

    def forward(self, x: Tensor) -> Choice:  # [N, D]
        if x.shape[0] > 1:
            choice: Choice = self.gate(x)
            return choice
        ids = self.choices.index_select(0, self.position)  # [1, A]
        weights = self.gate.logits(x).gather(1, ids).softmax(-1)
        if self.ahead is None or not self.distance:
            return Choice(ids, weights)
        return Choice(ids, weights, self.ahead.index_select(0, self.position)[0])

    def step(self, x: Tensor) -> Choice:  # [1, D]
        row = self.rows.index_select(0, self.position)[0]  # [A + d E]
        A = self.choices.shape[1]
        gates = self.gate.weight.index_select(0, row[:A])  # [A, D]
        weights = (gates * x).sum(-1).softmax(-1)  # [A] float32
        return Choice.unpack(torch.cat([weights.view(torch.int32), row]), A, self.gate.experts)
