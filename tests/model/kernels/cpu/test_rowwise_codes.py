"""Attention on a CPU to keys and values in 8 bits, row by row."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels.cpu import rowwise
from model.kv_cache import KVCache
from model.kv_codes import decode, encode
from tests.model.kernels.cpu.test_rowwise import reference
from tests.model.reference import CPU, TINY, cast, random_ids, random_model

pytest.importorskip("numba")

Coded = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]


def coded_text(G: int, C: int, K: int) -> Coded:
    """Codes and scales in a part of larger memory, as in a KV cache, with NaN behind the text."""
    codes, scales = encode(3 * torch.randn(2, 1, G, C + 3, K))
    scales[:, :, :, C:] = torch.nan
    return codes[0, 0, :, :C], codes[1, 0, :, :C], (scales[0, 0], scales[1, 0])


def decoded(text: Coded) -> list[Tensor]:  # [G, C, K] each
    parts = zip(text[:2], text[2], strict=True)
    return [decode(codes[None], scale[None, :, : codes.shape[1]], torch.float32)[0] for codes, scale in parts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("H", "G", "K"), [(8, 4, 32), (4, 4, 16), (8, 1, 64), (32, 8, 128), (5, 1, 48)])
def test_attention(H: int, G: int, K: int, dtype: torch.dtype) -> None:
    for T, past in ((1, 0), (1, 63), (1, 200), (5, 0), (33, 64)):
        k, v, scales = text = coded_text(G, past + T, K)
        q = (3 * torch.randn(T, H, K)).to(dtype)
        out = rowwise.attend_rows(q, [(k, v, past, T)], [scales])
        wide = decoded(text)
        expected = reference(q, *wide, past)
        # The result is rounded once. Everything before is float32.
        assert (out.double() - expected).abs().max() <= 0.52 * torch.finfo(dtype).eps * wide[1].abs().max()
        each = [rowwise.attend_rows(q[t : t + 1], [(k, v, past + t, 1)], [scales]) for t in range(T)]
        assert torch.equal(torch.cat(each), out)


def test_rows_of_several_texts() -> None:
    texts, queries, alone, scales = [], [], [], []
    for past, T in ((0, 3), (700, 1), (17, 40), (15, 1), (16, 1)):
        k, v, of = coded_text(4, past + T, 32)
        queries.append(torch.randn(T, 8, 32).bfloat16())
        texts.append((k, v, past, T))
        scales.append(of)
        alone.append(rowwise.attend_rows(queries[-1], texts[-1:], scales[-1:]))
    assert torch.equal(rowwise.attend_rows(torch.cat(queries), texts, scales), torch.cat(alone))


def test_a_value_that_is_not_a_number_shows() -> None:
    k, v, scales = coded_text(2, 90, 16)
    q = torch.randn(1, 4, 16).bfloat16()
    scales[1][1, 3] = torch.nan
    out = rowwise.attend_rows(q, [(k, v, 89, 1)], [scales])[0]
    assert out[:2].isfinite().all() and out[2:].isnan().all()
    assert rowwise.attend_rows(q, [(k, v, 2, 1)], [scales]).isfinite().all()


T = 20
MODEL = cast(random_model(replace(TINY, head_dim=16)), torch.bfloat16)
IDS = random_ids(TINY, 2, T)


def feed(ids: Tensor, borders: list[int], bits: int) -> Tensor:  # [1, T, V]
    kv = KVCache.allocate(MODEL.config, len(ids), T, torch.bfloat16, CPU, bits)
    with torch.inference_mode():
        return torch.cat([MODEL(ids[:, a:b], kv) for a, b in pairwise(borders)], 1)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(1, T - 1)).map(lambda inner: [0, *sorted(inner), T]))
def test_a_network_reads_its_codes_however_a_text_is_cut(borders: list[int]) -> None:
    """Attention has the same bits. Products are oneDNN's here, which round by the number of rows."""
    wide, coded = feed(IDS, [0, T], 16), feed(IDS, borders, 8)
    step = (coded - wide).float().abs()
    assert 0 < step.mean() < 0.1 * wide.float().std()
