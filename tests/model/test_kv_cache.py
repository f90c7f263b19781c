"""A text that is cut into several forwards has the logits of one pass over it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kv_cache import KVCache
from model.mixtral import Mixtral
from tests.model.reference import CPU, GEOMETRIES, TINY, new_kv, random_ids, random_model

B, T = 3, 24
CONFIG = replace(GEOMETRIES["8x7B's ratios"], hidden=64, ffn=96)
MODEL = random_model(CONFIG)
IDS = random_ids(CONFIG, B, T)
with torch.inference_mode():
    LOGITS = MODEL(IDS)  # [B, T, V], in one pass without a KV cache

cuts = st.sets(st.integers(1, T - 1)).map(lambda inner: [0, *sorted(inner), T])


def close(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def feed(model: Mixtral, ids: Tensor, kv: KVCache, borders: list[int]) -> Tensor:
    """Logits of ids[:, borders[0]:borders[-1]], with one forward from each border to the next."""
    with torch.inference_mode():
        pieces = [model(ids[:, a:b], kv) for a, b in pairwise(borders)]
    return torch.cat(pieces, 1)


@settings(max_examples=40, deadline=None)
@given(cuts, st.integers(1, B))
def test_chunks(borders: list[int], rows: int) -> None:
    kv = new_kv(MODEL, rows, capacity=T)
    close(feed(MODEL, IDS[:rows], kv, borders), LOGITS[:rows])
    assert kv.length == T


@pytest.mark.parametrize("name", GEOMETRIES)
def test_prefill_then_one_by_one(name: str) -> None:
    config = GEOMETRIES[name]
    model, ids = random_model(config), random_ids(config, 2, 14)
    with torch.inference_mode():
        expected = model(ids)
    close(feed(model, ids, new_kv(model, 2), [0, 5, 8, *range(9, 15)]), expected)


def test_last_gives_the_last_logits() -> None:
    with torch.inference_mode():
        for model_input in (IDS, IDS[:, :1]):
            out = MODEL(model_input, last=True)
            assert out.shape == (B, 1, CONFIG.vocab)
            close(out[:, 0], LOGITS[:, model_input.shape[1] - 1])
        close(MODEL(IDS, new_kv(MODEL, B), last=True)[:, 0], LOGITS[:, -1])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, T), st.data())
def test_truncate_then_go_on_is_as_if_fresh(length: int, data: st.DataObject) -> None:
    """Forgotten tokens leave no trace, whether one token follows or many."""
    keep = data.draw(st.integers(0, length))
    kv = new_kv(MODEL, B, capacity=T)
    with torch.inference_mode():
        MODEL((IDS[:, :length] + 1) % CONFIG.vocab, kv)
    kv.truncate(0)
    feed(MODEL, IDS, kv, [0, length])
    kv.truncate(keep)
    assert kv.length == keep
    if keep < T:
        stride = data.draw(st.integers(1, T - keep))
        close(feed(MODEL, IDS, kv, [*range(keep, T, stride), T]), LOGITS[:, keep:])


def test_rows_of_a_batch_do_not_mix() -> None:
    other = IDS.clone()
    other[1] = (IDS[1] + 1) % CONFIG.vocab
    logits = feed(MODEL, other, new_kv(MODEL, B), [0, 10, 11, 12, T])
    close(logits[[0, 2]], LOGITS[[0, 2]])
    assert ((logits[1] - LOGITS[1]).abs().amax(-1) > 1e-2).all()
    for row in range(B):
        alone = feed(MODEL, other[row : row + 1], new_kv(MODEL, 1), [0, 10, 11, 12, T])
        close(alone[0], logits[row])


def test_two_kv_caches_do_not_mix() -> None:
    """Two conversations on one model take turns, token by token."""
    ours, theirs = new_kv(MODEL, 1), new_kv(MODEL, 1)
    with torch.inference_mode():
        pairs = [(MODEL(IDS[:1, t : t + 1], ours), MODEL(IDS[1:2, t : t + 1], theirs)) for t in range(T)]
    for row, logits in enumerate(zip(*pairs, strict=True)):
        close(torch.cat(logits, 1)[0], LOGITS[row])


@pytest.mark.parametrize(("capacity", "limit"), [(10, 10), (1000, CONFIG.context)])
def test_overflow_is_refused_and_changes_nothing(capacity: int, limit: int) -> None:
    ids = random_ids(CONFIG, 1, limit + 1)
    kv = new_kv(MODEL, 1, capacity)
    with torch.inference_mode():
        MODEL(ids[:, : limit - 2], kv)
        before = kv.layers[-1].k[:, :, : limit - 2].clone()
        with pytest.raises(ValueError, match=rf"{limit - 2} tokens and 3 more .* {limit}"):
            MODEL(ids[:, limit - 2 :], kv)
        assert kv.length == limit - 2 and torch.equal(kv.layers[-1].k[:, :, : limit - 2], before)
        out = MODEL(ids[:, limit - 2 : limit], kv)  # tokens that fit still pass
        close(out, MODEL(ids[:, :limit])[:, -2:])
        with pytest.raises(ValueError, match=rf"{limit} tokens and 1 more .* {limit}"):
            MODEL(ids[:, limit:], kv)


@pytest.mark.parametrize(("rows", "of"), [(1, 2), (2, 1), (2, 3)])
def test_a_batch_that_is_not_the_kvs_is_refused(rows: int, of: int) -> None:
    kv = new_kv(MODEL, of)
    with torch.inference_mode():
        MODEL(IDS[:of, :4], kv)
        before = kv.layers[0].k[:, :, :4].clone()
        with pytest.raises(ValueError, match=f"batch of {rows} for a KV cache of {of}"):
            MODEL(IDS[:rows, 4:6], kv)
    assert kv.length == 4 and torch.equal(kv.layers[0].k[:, :, :4], before)
    assert kv.layers[0].k[:, :, 4:].isnan().all()


def test_overflow_without_kv() -> None:
    with pytest.raises(ValueError, match=f"0 tokens and {CONFIG.context + 1} more"):
        MODEL(random_ids(CONFIG, 1, CONFIG.context + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "capacity"), [(1, 1), (2, 77)])
def test_bytes_are_those_of_the_tensors(dtype: torch.dtype, rows: int, capacity: int) -> None:
    for config in (TINY, GEOMETRIES["8x22B's ratios"], GEOMETRIES["heads wider than hidden"]):
        kv = KVCache.allocate(config, rows, capacity, dtype, CPU)
        assert len(kv.layers) == config.layers and (kv.batch, kv.capacity) == (rows, capacity)
        tensors = [tensor for layer in kv.layers for tensor in (layer.k, layer.v)]
        assert all(tensor.dtype == dtype for tensor in tensors)
        size = KVCache.bytes(config, rows, capacity, dtype)
        assert size == sum(tensor.nbytes for tensor in tensors)
        assert {tensor.untyped_storage().nbytes() for tensor in tensors} == {size}, "one allocation"
        apart = {tensor.data_ptr() for tensor in tensors}
        assert len(apart) == 2 * config.layers == size // tensors[0].nbytes
        assert max(apart) - min(apart) == size - tensors[0].nbytes


def test_a_kv_cache_made_in_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        kv = KVCache.allocate(CONFIG, B, T, torch.float32, CPU)
        MODEL(IDS[:, :5], kv)
    with torch.no_grad():
        close(MODEL(IDS[:, 5:], kv), LOGITS[:, 5:])


@pytest.mark.parametrize("length", [-1, 6])
def test_truncate_refuses(length: int) -> None:
    kv = KVCache([], batch=1, capacity=8, length=5)
    with pytest.raises(ValueError, match=f"5 tokens to {length}"):
        kv.truncate(length)
    assert kv.length == 5


def test_append_stores_after_the_past() -> None:
    layer = KVCache.allocate(TINY, 2, 8, torch.float32, CPU).layers[0]
    k, v = torch.randn(2, TINY.kv_heads, 3, TINY.head_dim), torch.randn(2, TINY.kv_heads, 3, TINY.head_dim)
    layer.append(torch.ones_like(k), -torch.ones_like(v), 0)
    all_k, all_v = layer.append(k, v, 2)
    assert all_k.shape == all_v.shape == (2, TINY.kv_heads, 5, TINY.head_dim)
    assert (all_k[:, :, :2] == 1).all() and (all_v[:, :, :2] == -1).all()
    assert torch.equal(all_k[:, :, 2:], k) and torch.equal(all_v[:, :, 2:], v)
    assert all_k.data_ptr() == layer.k.data_ptr(), "a view, not a copy"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_parts_of_a_kv_cache_are_all_of_it(name: str) -> None:
    """Copied into another one of more room, they make it go on with the same bits."""
    config = GEOMETRIES[name]
    model, ids = random_model(config), random_ids(config, 2, 14)
    kv, other = new_kv(model, 2), new_kv(model, 2, capacity=40)
    feed(model, ids, kv, [0, 9])
    for part, target in zip(kv.parts(9).values(), other.parts(9).values(), strict=True):
        target.copy_(part)
    other.length = 9
    assert [*kv.parts(9)] == [*other.parts(9)]
    assert torch.equal(feed(model, ids, other, [9, 12, 13, 14]), feed(model, ids, kv, [9, 12, 13, 14]))
