"""Attention against a softmax in float64 that names every pair of tokens."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from model import attention
from model.attention import Attention, attend, causal_mask, has_flash
from model.linear import Linear
from model.rope import Rope
from tests.model.reference import CPU, GEOMETRIES, TINY, random_ids, random_model

HEADS = [(4, 4), (8, 2), (6, 1), (12, 2)]
LENGTHS = [(1, 1), (1, 9), (2, 2), (17, 17), (2, 9), (8, 9), (5, 70)]  # (T, S)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last T of S tokens, each over itself and those before it; query head h reads kv head h G / H."""
    _, H, T, K = q.shape
    G, S = k.shape[1:3]
    out = torch.empty(q.shape, dtype=torch.float64)
    for h in range(H):
        keys, values = k[:, h * G // H].double(), v[:, h * G // H].double()  # [B, S, K]
        for t in range(T):
            seen = S - T + t + 1
            scores = (keys[:, :seen] @ q[:, h, t, :, None].double())[..., 0] / math.sqrt(K)  # [B, seen]
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            out[:, h, t] = (weights[:, None] @ values[:, :seen])[:, 0]
    return out


def like_the_model(
    B: int, heads: int, T: int, K: int, room: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, heads, T, K] as a view of something larger, in the strides that projections and caches have."""
    if room:
        return torch.randn(B, heads, T + room, K).to(dtype)[:, :, :T]
    return torch.randn(B, T, heads + 3, K).to(dtype).transpose(1, 2)[:, :heads]


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize(("T", "S"), LENGTHS)
@pytest.mark.parametrize("B", [1, 3])
def test_attend(B: int, H: int, G: int, T: int, S: int) -> None:
    K = 10
    q = like_the_model(B, H, T, K) * 2
    k, v = like_the_model(B, G, S, K, room=4), like_the_model(B, G, S, K, room=4)
    out = attend(q, k, v, causal_mask(T, S, CPU))
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=1e-5, atol=1e-5)


def test_attend_asks_for_a_mask_where_one_is_needed() -> None:
    with pytest.raises(AssertionError):
        attend(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "S"), [(1, 9), (5, 5), (3, 9)])
def test_attend_in_half_precision(dtype: torch.dtype, T: int, S: int) -> None:
    q = like_the_model(2, 8, T, 16, dtype=dtype)
    k, v = (like_the_model(2, 2, S, 16, room=1, dtype=dtype) for _ in range(2))
    out = attend(q, k, v, causal_mask(T, S, CPU))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_causal_mask(T: int, S: int) -> None:
    mask = causal_mask(T, S, CPU)
    if T == 1 or T == S:
        assert mask is None
        return
    assert mask is not None and mask.shape == (T, S) and mask.dtype == torch.bool
    for t in range(T):
        assert mask[t].tolist() == [s <= S - T + t for s in range(S)]


@pytest.mark.parametrize("K", [16, 12])
@pytest.mark.parametrize("flash", [False, True])
def test_what_a_gpu_does_behind_other_tokens(flash: bool, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention if that can be used, else a mask; of heads that flash attention takes."""
    B, T, S = 3, 5, 9
    q, k, v = like_the_model(B, 8, T, K), *(like_the_model(B, 2, S, K, room=1) for _ in range(2))
    asked, expected = [], naive(q, k, v).float()

    def kernel(*given: Tensor, is_causal: bool) -> tuple[Tensor, None]:
        assert all(a is b for a, b in zip(given, (q, k, v), strict=True)) and is_causal
        asked.append("kernel")
        return expected, None

    def can_use(params: object) -> bool:
        asked.append("can")
        return flash

    monkeypatch.setattr(attention, "can_use_flash_attention", can_use)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", kernel)
    torch.testing.assert_close(attention.attend_behind(q, k, v), expected, rtol=1e-5, atol=1e-5)
    assert asked == ([] if K == 12 else ["can", "kernel"] if flash else ["can"])


def test_flash_attentions_operator_takes_what_it_is_given() -> None:
    q, k = torch.empty(2, 8, 5, 16, device="meta"), torch.empty(2, 2, 9, 16, device="meta")
    assert torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, is_causal=True)[0].shape == q.shape
    assert causal_mask(5, 9, torch.device("cuda")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_a_later_chunk_takes_no_memory_for_scores(dtype: torch.dtype) -> None:
    gpu, T, S = torch.device("cuda", 0), 256, 1280
    capability = torch.cuda.get_device_capability(gpu)
    if dtype == torch.bfloat16 and capability < (8, 0):
        pytest.skip("it computes no bfloat16")
    q = like_the_model(2, 8, T, 128, dtype=dtype).to(gpu)
    k, v = (like_the_model(2, 2, S, 128, room=9, dtype=dtype).to(gpu) for _ in range(2))
    attend(q, k, v, causal_mask(T, S, gpu))
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    with torch.inference_mode():
        out = attend(q, k, v, causal_mask(T, S, gpu))
    taken, scores = torch.cuda.max_memory_allocated(gpu) - before, 2 * 8 * T * S * 4
    assert taken < scores // 2 or not has_flash(dtype, capability)
    close = 1e-3 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(out.double().cpu(), naive(q.cpu(), k.cpu(), v.cpu()), rtol=close, atol=close)


def test_where_flash_attention_is() -> None:
    capabilities = ((7, 5), (8, 0), (9, 0))
    assert [has_flash(torch.float16, found) for found in capabilities] == [False, True, True]
    assert not any(has_flash(torch.float32, found) for found in capabilities)


def test_module_without_cache() -> None:
    """Projections, rotation and heads put together, against separate q, k, v."""
    config = replace(TINY, heads=6, kv_heads=2, head_dim=10)
    B, T, H, G, K = 2, 7, 6, 2, 10
    module = Attention(config, partial(Linear, dtype=torch.float32, device=CPU))
    torch.nn.init.normal_(module.qkv_proj.weight, std=0.3)
    torch.nn.init.normal_(module.o_proj.weight, std=0.3)
    rope = Rope.table(20, K, 1e4, torch.float32, CPU).at(3, 3 + T)
    x = torch.randn(B, T, config.hidden)
    q, k, v = module.qkv_proj.weight.split([H * K, G * K, G * K])

    def heads(weight: Tensor) -> Tensor:
        return torch.stack([x @ rows.T for rows in weight.split(K)], 1)  # [B, heads, T, K]

    out = naive(rope(heads(q)), rope(heads(k)), heads(v))  # [B, H, T, K]
    expected = sum(out[:, h] @ module.o_proj.weight[:, h * K : (h + 1) * K].double().T for h in range(H))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(module(x, rope, None, None, 0).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["8x7B's ratios", "3 of 8 experts"])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_no_token_sees_the_future(name: str, place: int) -> None:
    config = GEOMETRIES[name]
    model, ids = random_model(config), random_ids(config, 2, 12)
    other = ids.clone()
    other[:, place] = (ids[:, place] + 1) % config.vocab
    with torch.inference_mode():
        change = (model(ids) - model(other)).abs().amax(-1)  # [B, T]
    assert (change[:, :place] < 1e-5).all()
    assert (change[:, place:] > 1e-3).all(), "the past is seen by all that follow"
