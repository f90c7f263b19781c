"""Guessing which experts later layers will need: their gates, evaluated on what this layer's gate sees
(arXiv 2312.17238, section 3.2).

Layers change the residual stream a little at a time, so the next layer's norm and gate on this layer's
residual stream often choose what they will choose on their own. This layer's gate sees x = h * v, h being
the normed stream and v the norm's weight; the next layer's would see about h * v'. So the guess is one
product with `gate' * (v' / v)`, which is prepared once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.mixtral import Block


class Lookahead:
    """The gates of the next `distance` layers, as each layer's x sees them."""

    def __init__(self, blocks: Sequence[Block], distance: int) -> None:
        self.distance = distance
        self.gates = [
            torch.cat([seen_from(block, later) for later in blocks[layer + 1 : layer + 1 + distance]])
            if blocks[layer + 1 : layer + 1 + distance]
            else None
            for layer, block in enumerate(blocks)
        ]  # [d * E, D] float32, d = min(distance, layers left)

    def rank(self, layer: int, x: Tensor) -> Tensor | None:
        """For each of the next layers, its experts, likeliest first: [d, E] int64. None behind the last
        layer.

        x [N, D] is what `layer`'s gate sees. Of several tokens the probabilities are added.
        """
        gates = self.gates[layer]
        if gates is None:
            return None
        d = min(self.distance, len(self.gates) - 1 - layer)
        logits = F.linear(x.float(), gates).view(x.shape[0], d, -1)  # [N, d, E]
        return logits.softmax(-1).sum(0).argsort(dim=-1, descending=True)


def seen_from(block: Block, later: Block) -> Tensor:  # [E, D] float32
    """A later layer's gate, so that it takes what `block`'s gate takes."""
    mine = block.post_attention_layernorm.weight.float()
    theirs = later.post_attention_layernorm.weight.float()
    ratio = torch.where(mine.abs() > 1e-6, theirs / mine, 0)  # it is only a guess: no care for odd weights
    return later.block_sparse_moe.gate.weight * ratio
