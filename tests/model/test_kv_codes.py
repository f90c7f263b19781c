"""Keys and values in 8 bits, against numbers that are rounded one by one."""

import math
from itertools import pairwise
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kv_cache import KVCache, LayerKV
from model.kv_codes import STRETCH, decode, encode
from model.mixtral import Mixtral
from tests.model.reference import CPU, GEOMETRIES, TINY, random_ids, random_model
from tests.model.reference import cast as in_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rounded_one_by_one(x: Tensor) -> tuple[list[int], float]:
    """The codes and the scale of numbers [K], by Python's arithmetic."""
    numbers = x.tolist()
    scale = float32(max(map(abs, numbers)) / 127)
    scale = max(scale, 2.0**-126)
    return [round(float32(number / scale)) for number in numbers], scale  # ties to even, as PyTorch


def float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).float().item()


def spread(x: Tensor) -> Tensor:
    """[K] as [B, G, S, K]."""
    return x.view(1, 1, 1, -1)


numbers = st.lists(
    st.floats(-60000, 60000, width=16)
    | st.floats(-1, 1, width=16)
    | st.sampled_from([0.0, -0.0, 127.0, 0.5]),
    min_size=2,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(numbers, st.sampled_from(DTYPES))
def test_codes_are_those_of_one_number_after_the_other(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values).to(dtype)
    codes, scale = encode(x)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == ()
    assert (codes.tolist(), scale.item()) == rounded_one_by_one(x)
    got = decode(spread(codes), scale.view(1, 1, 1), dtype).flatten()
    expected = torch.tensor([float32(code * scale.item()) for code in codes.tolist()]).to(dtype)
    assert got.dtype == dtype and torch.equal(got, expected)
    slack = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert ((got.double() - x.double()).abs() <= scale.double() * (0.5 + 127 * slack)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_a_dtype(dtype: torch.dtype) -> None:
    """The largest numbers stay finite, the smallest become 0, and 0 stays 0."""
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    size = 1e38 if dtype == torch.float32 else most
    for values in ((size, -size, 0.0), (least, -least / 2, 0.0), (0.0, 0.0, -0.0)):
        x = torch.tensor(values, dtype=torch.float64).to(dtype)
        codes, scale = encode(x)
        got = decode(spread(codes), scale.view(1, 1, 1), dtype).flatten()
        assert scale.isfinite() and got.isfinite().all() and got[2] == 0
        assert got[0] == x[0] or (x[0] < 1e-36 and abs(float(got[0] - x[0])) < 1e-38)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_not_hidden(odd: float) -> None:
    x = torch.randn(2, 3, 4, 8)
    x[1, 2, 3, 5] = odd
    codes, scales = encode(x)
    got = decode(codes, scales, torch.float32)
    wrong = got.isnan()
    assert wrong[1, 2, 3].all() and wrong.sum() == 8
    assert not codes[1, 2, 3].any(), "the same bytes on every machine"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, STRETCH - 1, STRETCH, 2 * STRETCH + 3])
def test_decoding_in_stretches_is_decoding_at_once(tokens: int, dtype: torch.dtype) -> None:
    codes, scales = encode(torch.randn(2, 2, tokens, 4))
    assert torch.equal(decode(codes, scales, dtype), (codes.float() * scales[..., None]).to(dtype))


# --- the KV cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "capacity"), [(1, 1), (2, 77)])
def test_bytes_are_those_of_the_tensors(dtype: torch.dtype, rows: int, capacity: int) -> None:
    for config in (TINY, GEOMETRIES["odd vocabulary, one layer"], GEOMETRIES["heads narrower than hidden"]):
        kv = KVCache.allocate(config, rows, capacity, dtype, CPU, bits=8)
        assert len(kv.layers) == config.layers and (kv.batch, kv.capacity) == (rows, capacity)
        codes = [tensor for layer in kv.layers for tensor in (layer.k, layer.v)]
        scales = [tensor for layer in kv.layers for tensor in cast(tuple[Tensor, Tensor], layer.scales)]
        vectors = (rows, config.kv_heads, capacity)
        assert all(t.dtype == torch.int8 and t.shape == (*vectors, config.head_dim) for t in codes)
        assert all(t.dtype == torch.float32 and t.shape == vectors for t in scales)
        size = KVCache.bytes(config, rows, capacity, dtype, bits=8)
        assert size == sum(t.nbytes for t in codes + scales)
        assert {t.untyped_storage().nbytes() for t in codes + scales} == {size}, "one allocation"
        for n, tensor in enumerate(codes + scales):  # none lies in another
            tensor.fill_(n % 100)
        assert [int(t.flatten()[0]) for t in codes + scales] == [n % 100 for n in range(4 * config.layers)]
        assert all((t == t.flatten()[0]).all() for t in codes + scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_stores_after_the_past(dtype: torch.dtype) -> None:
    layer = KVCache.allocate(TINY, 2, 8, dtype, CPU, bits=8).layers[0]
    shape = (2, TINY.kv_heads, 5, TINY.head_dim)
    k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    layer.append(k[:, :, :2], v[:, :, :2], 0)
    all_k, all_v = layer.append(k[:, :, 2:], v[:, :, 2:], 2)
    assert all_k.dtype == dtype
    assert torch.equal(all_k, decode(*encode(k), dtype)) and torch.equal(all_v, decode(*encode(v), dtype))
    assert not layer.k[:, :, 5:].any() and not cast(tuple[Tensor, Tensor], layer.scales)[1][:, :, 5:].any()


class Plain(LayerKV):
    """Keeps wide numbers, each rounded by itself to what a code stands for."""

    def append(self, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
        return super().append(slowly(k), slowly(v), past)


def slowly(x: Tensor) -> Tensor:  # [B, G, T, K]
    rows = []
    for row in x.flatten(0, 2):
        codes, scale = rounded_one_by_one(row)
        rows.append(torch.tensor([code * scale for code in codes], dtype=torch.float64).float())
    return torch.stack(rows).to(x.dtype).view(x.shape)


T = 12
cuts = st.sets(st.integers(1, T - 1)).map(lambda inner: [0, *sorted(inner), T])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_sees_the_numbers_that_codes_stand_for(dtype: torch.dtype) -> None:
    """Bit for bit, in a prompt of chunks and in tokens one by one, whatever lies behind the text."""
    model = in_dtype(random_model(TINY), dtype)
    ids = random_ids(TINY, 2, T)
    kv = stale(KVCache.allocate(TINY, 2, T + 5, dtype, CPU, bits=8))
    wide = KVCache.allocate(TINY, 2, T + 5, dtype, CPU)
    plain = KVCache([Plain(layer.k, layer.v) for layer in wide.layers], 2, T + 5)
    for a, b in pairwise([0, 4, 7, 8, 9, 12]):
        with torch.inference_mode():
            assert torch.equal(model(ids[:, a:b], kv), model(ids[:, a:b], plain))


def stale(kv: KVCache) -> KVCache:
    """With NaN for every scale, as if an earlier text had overflowed."""
    for layer in kv.layers:
        for scale in layer.scales or ():
            scale.fill_(math.nan)
        layer.k.fill_(77), layer.v.fill_(77)
    return kv


MODEL = random_model(GEOMETRIES["8x7B's ratios"])
IDS = random_ids(MODEL.config, 1, T)
with torch.inference_mode():
    WIDE = MODEL(IDS)  # [1, T, V]


def feed(model: Mixtral, kv: KVCache, borders: list[int]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(IDS[:, a:b], kv) for a, b in pairwise(borders)], 1)


@settings(max_examples=25, deadline=None)
@given(cuts, st.data())
def test_a_text_in_any_chunks_and_cut_back(borders: list[int], data: st.DataObject) -> None:
    """Where it is cut changes a result by no more than a few steps of some codes, and what was forgotten
    changes nothing."""
    config = MODEL.config
    kv = stale(KVCache.allocate(config, 1, T, torch.float32, CPU, bits=8))
    logits = feed(MODEL, kv, borders)
    error = (logits - WIDE).abs().max()
    assert 1e-4 < error < 0.1 * WIDE.std()
    kept = data.draw(st.integers(0, len(borders) - 2))
    kv.truncate(borders[kept])
    assert torch.equal(feed(MODEL, kv, borders[kept:]), logits[:, borders[kept] :])


def test_texts_decoded_together_have_the_bits_they_have_alone() -> None:
    config = MODEL.config
    texts = [random_ids(config, 1, length, seed=length) for length in (3, 9, 5)]
    next_ids = torch.tensor([4, 9, 2])
    with torch.inference_mode():
        for bits in (8, 16):
            made = [
                [KVCache.allocate(config, 1, 16, torch.float32, CPU, bits) for _ in texts] for _ in range(2)
            ]
            for kvs in made:
                for text, kv in zip(texts, kvs, strict=True):
                    MODEL(text, kv)
            together = MODEL.decode(next_ids, made[0])
            alone = [MODEL.decode(i[None], [kv]) for i, kv in zip(next_ids, made[1], strict=True)]
            assert torch.equal(together, torch.cat(alone))
