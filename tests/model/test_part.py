"""Parts of a network, one after the other, compute what the whole computes, bit for bit."""

from functools import partial

import pytest
import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.part import Part
from tests.parts import Chain, compare, in_order, splits, work

CONFIG = ModelConfig(
    vocab=61, hidden=32, layers=4, heads=4, kv_heads=2, head_dim=8, ffn=24, experts=4, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip


def random_model(dtype: torch.dtype = torch.float32) -> Mixtral:
    torch.manual_seed(0)
    model = Mixtral(CONFIG, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=2 / weight.shape[-1] ** 0.5).add_("norm" in name)
    return model


@torch.no_grad()
def part_of(whole: Mixtral, part: Part) -> Mixtral:
    """A part with the weights of a model. Weights that nothing fills are NaN."""
    model = Mixtral(part.config(whole.config), whole.dtype, embeds=part.embeds, heads=part.heads)
    mine, filled = dict(model.named_parameters()), set()
    for name, weight in whole.named_parameters():
        if (own := part.own_name(name)) is not None:
            mine[own].copy_(weight)
            filled.add(own)
    assert filled == mine.keys()
    return model


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 16), (torch.bfloat16, 8), (torch.float16, 16)])
@torch.inference_mode()
def test_all_splits(dtype: torch.dtype, bits: int) -> None:
    whole = random_model(dtype)
    compare(partial(part_of, whole), whole, bits)


@torch.inference_mode()
def test_other_weights_in_one_layer_would_show() -> None:
    whole = random_model()
    models = [part_of(whole, part) for part in in_order(CONFIG, (1, 2, 1))]
    models[1].blocks[1].block_sparse_moe.gate.weight.mul_(1.01)
    pairs = zip(work(Chain(models), CONFIG.vocab), work(Chain([whole]), CONFIG.vocab), strict=True)
    assert not any(torch.equal(mine, theirs) for mine, theirs in list(pairs)[:5])


def test_parts_go_by_rank_around_a_ring() -> None:
    assert (
        list(splits(3, 2)) == [(3,), (1, 2), (2, 1)]
        and len(list(splits(5))) == 15
        and len(list(splits(4))) == 8
    )
    for layers in splits(4):
        parts = in_order(CONFIG, layers)
        assert [part.layers for part in parts] == list(layers)
        assert [part.first for part in parts] == [sum(layers[:n]) for n in range(len(layers))]
        assert [part.embeds for part in parts] == [True] + [False] * (len(layers) - 1)
        assert [part.heads for part in parts] == [False] * (len(layers) - 1) + [True]
    assert Part.split(CONFIG, [4]) == (Part.whole(CONFIG),)
    assert [part.first for part in Part.split(CONFIG, (1, 1, 2))] == [3, 0, 1]
    for counts, said in (((3, 2), r"3 \+ 2"), ((4, 0), r"4 \+ 0"), ((5, -1), r"5 \+ -1"), ((), "none")):
        with pytest.raises(ModelError, match=f"the ranks' layers are {said}, and must be 4 in all"):
            Part.split(CONFIG, counts)


@torch.inference_mode()
def test_a_part_that_is_full_is_left_as_it_was() -> None:
    model = part_of(random_model(), Part(1, 2, embeds=False, heads=False))
    kv = KVCache.allocate(model.config, 1, 4, model.dtype, model.device)
    model.through(torch.randn(1, 3, CONFIG.hidden), kv)
    with pytest.raises(ValueError, match="3 tokens and 2 more do not fit a context of 4"):
        model.through(torch.randn(1, 2, CONFIG.hidden), kv)
    model.through_each(torch.randn(1, CONFIG.hidden), [kv])
    with pytest.raises(ValueError, match="4 tokens and 1 more"):
        model.through_each(torch.randn(1, CONFIG.hidden), [kv])
    assert kv.length == 4
    assert KVCache.bytes(model.config, 1, 4, model.dtype) * 2 == KVCache.bytes(CONFIG, 1, 4, model.dtype)
