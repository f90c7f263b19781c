"""The gates of later layers as an earlier one sees them, against those layers' own norm and gate."""

from typing import Any

import pytest
import torch

from runtime.experts.lookahead import Lookahead, seen_from


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("N", [1, 6])
def test_it_is_the_later_layers_norm_and_gate_on_this_layers_stream(rig: Any, distance: int, N: int) -> None:
    """With norms whose weights differ, as those of the random model do not."""
    blocks = list(rig.engine.model.layers)
    generator = torch.Generator().manual_seed(N)
    kept = [block.post_attention_layernorm.weight.detach().clone() for block in blocks]
    try:
        with torch.no_grad():
            for block in blocks:
                block.post_attention_layernorm.weight.copy_(
                    0.5 + torch.rand(rig.engine.config.hidden, generator=generator)
                )
            lookahead = Lookahead(blocks, distance)
            stream = torch.randn(N, rig.engine.config.hidden, generator=generator)
            for layer, block in enumerate(blocks):
                ranking = lookahead.rank(layer, block.post_attention_layernorm(stream))
                later = blocks[layer + 1 : layer + 1 + distance]
                assert (ranking is None) == (not later)
                for row, other in zip(ranking if ranking is not None else (), later, strict=True):
                    x = other.post_attention_layernorm(stream)
                    likely = other.block_sparse_moe.gate.logits(x).softmax(-1).sum(0)
                    assert torch.equal(row, likely.argsort(descending=True))
    finally:
        with torch.no_grad():
            for block, weight in zip(blocks, kept, strict=True):
                block.post_attention_layernorm.weight.copy_(weight)


def test_a_norm_weight_of_zero_is_no_infinity(rig: Any) -> None:
    blocks = list(rig.engine.model.layers)
    weight = blocks[0].post_attention_layernorm.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3] = 0
        assert seen_from(blocks[0], blocks[1]).isfinite().all()
        assert not seen_from(blocks[0], blocks[1])[:, 3].any()
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_of_several_tokens_probabilities_count(rig: Any) -> None:
    """Not logits: one token that is very sure does not outvote all others."""
    lookahead = Lookahead(list(rig.engine.model.layers), 1)
    assert lookahead.gates[0] is not None
    lookahead.gates[0] = torch.eye(rig.experts, rig.engine.config.hidden)
    x = torch.zeros(3, rig.engine.config.hidden)
    x[0, 5], x[1, 2], x[2, 2] = 100.0, 3.0, 3.0
    ranking = lookahead.rank(0, x)
    assert ranking is not None and ranking[0, :2].tolist() == [2, 5]
