"""Attention against a loop over all pairs of tokens in float64."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model import attention
from model.attention import Attending, Attention, attend, causal_mask, poisoned
from model.linear import Linear
from model.rope import Rope
from model.target import Target
from tests.model.reference import CPU, GEOMETRIES, TINY, random_ids, random_model

HEADS = [(4, 4), (8, 2), (6, 1), (12, 2)]
LENGTHS = [(1, 1), (1, 9), (2, 2), (17, 17), (2, 9), (8, 9), (5, 70)]  # (T, S)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last T of S tokens each see themselves and those before. Query head h reads kv head h G / H."""
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
    """[B, heads, T, K] as a view of something larger, with the strides of projections and KV caches."""
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


# --- on a GPU

FLASH, CUDNN = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention")


class Operators(TorchDispatchMode):
    """The names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(op.name().partition("::")[2])
        return op(*args, **(kwargs or {}))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """For fake tensors on a GPU: flash attention takes all that are asked about inside a device guard. Lists
    the queries of these guards."""
    entered: list[Tensor] = []
    inside: list[bool] = []

    @contextmanager
    def device_of(q: Tensor) -> Iterator[None]:
        entered.append(q)
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: bool(inside))
    return entered


@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_a_gpu_calls_flash_attention_itself_at_all_lengths(T: int, S: int, guarded: list[Tensor]) -> None:
    """PyTorch would pick cuDNN, which makes a plan for every length."""
    with FakeTensorMode(), Operators() as called:
        make = partial(torch.empty, dtype=torch.bfloat16, device="cuda")
        q = make(3, T, 11, 16).transpose(1, 2).narrow(1, 0, 8)
        k, v = (make(3, 2, S + 1, 16).narrow(2, 0, S) for _ in range(2))
        assert attend(q, k, v, None).shape == q.shape
    assert FLASH in called.names and not called.names & {CUDNN, "bmm", "_safe_softmax"}
    assert len(guarded) == 1 and guarded[0].device.index == q.device.index


@pytest.mark.parametrize(("flash", "K"), [(False, 16), (True, 12)])
def test_a_gpu_without_flash_attention_computes_scores(
    flash: bool, K: int, guarded: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: flash)
    asked: list[int] = []
    monkeypatch.setattr(attention, "attend_by_scores", lambda q, k, v: asked.append(q.shape[2]) or q)
    with FakeTensorMode(), Operators() as called:
        for T, S in ((5, 5), (5, 9)):
            q, k = torch.empty(1, 8, T, K, device="cuda"), torch.empty(1, 2, S, K, device="cuda")
            attend(q, k, k, None)
    assert asked == [5, 5] and FLASH not in called.names


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize(("T", "S"), [(2, 2), (7, 7), (7, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attend_by_scores(
    dtype: torch.dtype, T: int, S: int, H: int, G: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tokens at a time, so that the last group is smaller."""
    monkeypatch.setattr(attention, "SCORED", 3)
    q = like_the_model(2, H, T, 10, dtype=dtype) * 2
    k, v = (like_the_model(2, G, S, 10, room=4, dtype=dtype) for _ in range(2))
    out = attention.attend_by_scores(q, k, v)
    close = 1e-5 if dtype == torch.float32 else 2e-3
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=close, atol=close)


def test_flash_attentions_operator_takes_what_it_is_given() -> None:
    q, k = torch.empty(2, 8, 5, 16, device="meta"), torch.empty(2, 2, 9, 16, device="meta")
    assert torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, is_causal=True)[0].shape == q.shape
    assert causal_mask(5, 9, torch.device("cuda")) is None


SHAPE = replace(TINY, heads=8, kv_heads=2, head_dim=128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "S"), [(128, 8192), (256, 256), (1, 1280), (300, 1280)])
def test_on_a_gpu_it_is_right_and_takes_no_more_memory_than_planned(
    T: int, S: int, dtype: torch.dtype
) -> None:
    gpu = torch.device("cuda", 0)
    target = Target.of(gpu)
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    q = like_the_model(1, 8, T, 128, dtype=dtype).to(gpu)
    k, v = (like_the_model(1, 2, S, 128, room=9, dtype=dtype).to(gpu) for _ in range(2))
    attend(q, k, v, causal_mask(T, S, gpu))
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    way = Attending.of(SHAPE, dtype, target)
    with torch.inference_mode(), Operators() as called:
        out = attend(q, k, v, causal_mask(T, S, gpu))
    assert (FLASH in called.names) == (way is Attending.FLASH) and CUDNN not in called.names
    taken = torch.cuda.max_memory_allocated(gpu) - before
    split = 17 << 20  # with few rows, flash attention splits the keys among multiprocessors
    assert taken <= 2 * out.nbytes + way.bytes(SHAPE, dtype, T, S) + split or T == 1
    close = 1e-3 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(out.double().cpu(), naive(q.cpu(), k.cpu(), v.cpu()), rtol=close, atol=close)


def test_which_way_a_device_takes() -> None:
    gpus = [Target.hypothetical(capability) for capability in ((7, 5), (8, 0), (12, 0))]
    ways = [Attending.of(SHAPE, torch.float16, target) for target in (Target.of(CPU), *gpus)]
    assert ways == [Attending.ROWS, Attending.SCORES, Attending.FLASH, Attending.FLASH]
    assert Attending.of(SHAPE, torch.float32, Target.of(CPU)) is Attending.MASK
    assert Attending.of(SHAPE, torch.float32, gpus[-1]) is Attending.SCORES
    for head_dim in (12, 264):
        odd = replace(SHAPE, head_dim=head_dim)
        assert Attending.of(odd, torch.bfloat16, gpus[-1]) is Attending.SCORES


# --- numbers that are not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_unchanged_unless_a_query_or_key_is_not_finite(dtype: torch.dtype) -> None:
    qk, v = (like_the_model(1, heads, 5, 16) for heads in (6, 2))
    qk, v = (qk * 3e4).clamp(-6e4, 6e4).to(dtype), v.to(dtype)
    assert torch.equal(poisoned(v, qk), v)
    for odd in (torch.nan, torch.inf, -torch.inf):
        for place in ((0, 0, 0, 0), (0, 5, 4, 15)):
            bad = qk.clone()
            bad[place] = odd
            assert poisoned(v, bad).isnan().all()


@pytest.mark.parametrize("by_scores", [False, True])
@pytest.mark.parametrize(("T", "S"), LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_token_that_sees_nan_becomes_nan(dtype: torch.dtype, T: int, S: int, by_scores: bool) -> None:
    """At any score, even one so low that the token's weight rounds to 0."""
    for place in {0, S - T}:
        for score in (torch.nan, -torch.inf, -1e4, 0.0):
            q = torch.ones(1, 4, T, 16, dtype=dtype)
            k, v = torch.ones(1, 2, S, 16, dtype=dtype), torch.ones(1, 2, S, 16, dtype=dtype)
            k[:, :, place], v[:, :, place] = score, torch.nan
            out = (
                attention.attend_by_scores(q, k, v) if by_scores else attend(q, k, v, causal_mask(T, S, CPU))
            )
            assert out[:, :, -1].isnan().all(), (place, score)


def test_module_without_kv() -> None:
    """Projections, rotation and heads together, against separate q, k and v."""
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
    assert (change[:, place:] > 1e-3).all(), "every later token sees the change"
