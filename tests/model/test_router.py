"""Routers' rankings for later layers, against those layers' own norms and gates."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.mixtral import Mixtral
from model.router import Router, seen_from
from tests.model.reference import TINY, random_model

CONFIG = replace(TINY, layers=4)


def model_with_different_norms() -> Mixtral:
    model = random_model(CONFIG)
    with torch.no_grad():
        for block in model.layers:
            block.post_attention_layernorm.weight.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("N", [1, 6])
def test_a_ranking_is_the_later_layers_norm_and_gate_on_this_layers_stream(distance: int, N: int) -> None:
    model = model_with_different_norms()
    model.look_ahead(distance)
    stream = torch.randn(N, CONFIG.hidden)
    for layer, block in enumerate(model.layers):
        ranking = block.block_sparse_moe.gate(block.post_attention_layernorm(stream)).ranking
        later = list(model.layers)[layer + 1 : layer + 1 + distance]
        assert block.block_sparse_moe.gate.distance == len(later)
        assert (ranking is None) == (not later)
        for row, other in zip(ranking if ranking is not None else (), later, strict=True):
            x = other.post_attention_layernorm(stream)
            likely = F.linear(x, other.block_sparse_moe.gate.weight).softmax(-1).sum(0)
            assert torch.equal(row, likely.argsort(descending=True))


def test_looking_ahead_changes_no_choice() -> None:
    model, x = model_with_different_norms(), torch.randn(5, CONFIG.hidden)
    router = model.layers[0].block_sparse_moe.gate
    alone = router(x)
    model.look_ahead(2)
    choice = router(x)
    assert alone.ranking is None and choice.ranking.shape == (2, CONFIG.experts)
    assert torch.equal(alone.ids, choice.ids) and torch.equal(alone.weights, choice.weights)
    model.look_ahead(0)
    assert router(x).ranking is None


def test_a_norm_weight_of_zero_is_no_infinity() -> None:
    mine, theirs, gate = torch.ones(32), torch.ones(32), torch.randn(4, 32)
    mine[3] = 0
    seen = seen_from(mine, theirs, gate)
    assert seen.isfinite().all() and not seen[:, 3].any()
    assert torch.equal(seen[:, :3], gate[:, :3])


def test_a_ranking_of_several_tokens_adds_probabilities() -> None:
    """Logits would let one token that is very sure outvote all others."""
    router = Router(CONFIG, torch.device("cpu")).requires_grad_(False)
    router.look_ahead([torch.eye(CONFIG.experts, CONFIG.hidden)])
    x = torch.zeros(3, CONFIG.hidden)
    x[0, 3], x[1, 2], x[2, 2] = 100.0, 3.0, 3.0
    ranking = router(x).ranking
    assert ranking is not None and ranking[0, :2].tolist() == [2, 3]


def test_looking_ahead_updates_the_gates_of_a_step() -> None:
    model = model_with_different_norms()
    router = model.layers[1].block_sparse_moe.gate
    model.prepare_step()
    assert torch.equal(router.gates, router.weight)
    model.look_ahead(1)
    assert torch.equal(router.gates, torch.cat([router.weight, router.ahead]))
    model.look_ahead(0)
    assert torch.equal(router.gates, router.weight)
