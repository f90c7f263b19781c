"""The small kernels of a step, against plain PyTorch on a CPU. `test_step.py` runs these tests in a process
of its own.

The kernels run on a GPU, or with TRITON_INTERPRET=1 in the environment on the CPU.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels import launching, step
from model.kernels.step import (
    SPLITS,
    add_and_norm,
    attend,
    fetch,
    rotate_and_append,
    route,
    tile_positions,
)
from model.kv_codes import decode, encode
from model.mixtral import RMSNorm
from model.rope import Rope
from tests.model.kernels.interpreted import DEVICE, tiles  # noqa: F401, a fixture
from tests.model.kernels.matrix_cases import DTYPES, TOLERANCE
from tests.model.reference import TINY

CPU = torch.device("cpu")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the last bit, once or twice
HEADS = [(6, 2), (3, 3), (16, 1), (1, 1)]  # H, G


@pytest.fixture(autouse=True)
def uninitialized_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that it shows if a kernel reads what none has written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def at(position: int) -> Tensor:
    return torch.tensor([position], device=DEVICE)


@pytest.mark.parametrize("D", [1, 96, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(D: int, dtype: torch.dtype) -> None:
    module = RMSNorm(replace(TINY, hidden=D), dtype, CPU)
    module.weight.data = torch.randn(D).to(dtype)
    for x in (torch.randn(1, D), torch.randn(1, D) * 100, torch.zeros(1, D)):
        both = x.to(dtype), torch.randn(1, D).to(dtype) * (x != 0)
        weight, eps = module.weight.detach().to(DEVICE), module.eps.to(DEVICE)
        total, y = add_and_norm(*(part.to(DEVICE) for part in both), weight, eps)
        assert torch.equal(total.cpu(), both[0] + both[1]) and y.dtype == dtype
        torch.testing.assert_close(
            y.cpu(), module(total.cpu()).detach(), rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * 0.01
        )


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(H: int, G: int, dtype: torch.dtype) -> None:
    C, K = 9, 32
    rope = Rope.table(C + 3, K, 1e4, dtype, CPU)
    qkv = torch.randn(1, (H + 2 * G) * K).to(dtype)
    heads = qkv.view(1, H + 2 * G, 1, K)
    for position in (0, 5, C - 1):
        k, v = (torch.randn(1, G, C, K).to(dtype) for _ in range(2))
        expected_k, expected_v = k.clone(), v.clone()
        turned = rope.at(position, position + 1)(heads[:, : H + G])
        expected_k[:, :, position], expected_v[:, :, position] = turned[:, H:, 0], heads[:, H + G :, 0]
        k, v = k.to(DEVICE), v.to(DEVICE)
        tables = rope.cos.to(DEVICE), rope.sin.to(DEVICE)
        q = rotate_and_append(qkv.to(DEVICE), *tables, k[0], v[0], at(position))  # with or without a batch
        again = rotate_and_append(qkv.to(DEVICE), *tables, k, v, at(position))
        assert q.shape == (H, K) and torch.equal(q, again)
        tolerance = 1e-6 if dtype == torch.float32 else 0  # in 16 bits a product is exact in float32
        torch.testing.assert_close(q.cpu(), turned[0, :H, 0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(k.cpu(), expected_k, rtol=tolerance, atol=tolerance)
        assert torch.equal(v.cpu(), expected_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_is_no_number_where_its_key_is_not_finite(dtype: torch.dtype) -> None:
    H, G, C, K = 3, 2, 5, 16
    rope = Rope.table(C, K, 1e4, dtype, CPU)
    tables = rope.cos.to(DEVICE), rope.sin.to(DEVICE)
    for odd in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max):  # the last overflows as it turns
        qkv = torch.randn(H + 2 * G, K).to(dtype)
        qkv[H + 1, [0, K // 2]] = odd
        k, v = (torch.zeros(G, C, K, dtype=dtype, device=DEVICE) for _ in range(2))
        rotate_and_append(qkv.view(1, -1).to(DEVICE), *tables, k, v, at(4))
        assert v[1, 4].isnan().any() and torch.equal(v[0, 4].cpu(), qkv[H + G]) and not v[:, :4].any()


# --- attention


def check_attention(q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    """q [H, K], k and v [1, G, C, K]: every element within tolerance of what it would be, were all values of
    one sign."""
    (H, K), G = q.shape, k.shape[1]
    y = attend(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), at(position)).cpu()
    assert y.shape == (1, H * K) and y.dtype == q.dtype
    keys, values = (t[0, :, : position + 1].double().repeat_interleave(H // G, 0) for t in (k, v))
    shares = ((q.double()[:, None] * keys).sum(-1) / K**0.5).softmax(-1)[:, None]  # [H, 1, S]
    error = (y.view(H, 1, K).double() - shares @ values).abs()
    assert bool((error <= TOLERANCE[q.dtype] * (shares @ values.abs())).all()), error.max()
    return y


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(H: int, G: int, dtype: torch.dtype) -> None:
    C, K = 200, 32
    q = torch.randn(H, K).to(dtype)
    k, v = (torch.randn(1, G, C, K).to(dtype) for _ in range(2))
    assert tile_positions(K, True) == tile_positions(K, False) == 64
    for position in (0, 63, 64, C - 1):
        check_attention(q, k, v, position)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("K", [16, 256])
def test_stretches_of_several_tiles(K: int) -> None:
    """One tile to each of the stretches; a tile more, so that some have two and some none; and their ends."""
    q = torch.randn(2, K).half()
    tile = tile_positions(K, launching.uses_tensor_cores(q))
    k, v = (torch.randn(1, 1, 2 * SPLITS * tile, K).half() for _ in range(2))
    for position in (SPLITS * tile - 1, SPLITS * tile, SPLITS * tile + 2 * tile - 1, 2 * SPLITS * tile - 1):
        check_attention(q, k, v, position)


def test_attention_in_extremes() -> None:
    """Scores that e to the power of them would overflow; the largest in the first or in the last stretch."""
    q, k = torch.randn(4, 16), torch.randn(1, 2, 150, 16)
    for row in (0, 149):
        large = k.clone()
        large[:, :, row] = 1000 * q[::2]
        check_attention(q, large, torch.randn(1, 2, 150, 16), 149)
        check_attention(q, -large, torch.randn(1, 2, 150, 16), 149)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 5, 149])
def test_a_query_or_value_that_is_not_finite_shows(odd: float, position: int) -> None:
    """Of a query, in its head alone: whether all scores are -inf, some of them, or none a number. Of a value,
    in all heads that share it, however low its score is."""
    for sign in (1.0, -1.0, 0.0):
        q, v = torch.ones(4, 16), torch.randn(1, 2, 150, 16)
        k = torch.full((1, 2, 150, 16), sign)
        k[:, :, ::2] *= torch.randn(75, 1)
        q[2, 3] = odd
        y = attend(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), at(position)).cpu().view(4, 16)
        assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()
    q, k, v = torch.ones(4, 16), torch.zeros(1, 2, 150, 16), torch.ones(1, 2, 150, 16)
    for score in (-100.0, -torch.inf, torch.nan):
        k[:, 1, position], v[:, 1, position] = score, torch.nan
        y = attend(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), at(position)).cpu().view(4, 16)
        assert y[2:].isnan().all() and y[:2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_larger_cache_gives_the_same_bits(dtype: torch.dtype) -> None:
    """And so does whatever lies behind the position."""
    q = torch.randn(4, 16).to(dtype)
    k, v = (torch.randn(1, 2, 150, 16).to(dtype) for _ in range(2))
    for position in (0, 64, 149):
        expected = check_attention(q, k, v, position)
        large = [torch.full((1, 2, 5000, 16), float("nan"), dtype=dtype) for _ in range(2)]
        for cache, rows in zip(large, (k, v), strict=True):
            cache[:, :, : position + 1] = rows[:, :, : position + 1]
        y = attend(q.to(DEVICE), *(cache.to(DEVICE) for cache in large), at(position))
        assert torch.equal(y.cpu(), expected)


# --- keys and values in 8 bits


@pytest.mark.parametrize(("H", "G"), [(6, 2), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_the_plain_way(H: int, G: int, dtype: torch.dtype) -> None:
    """Also of numbers that are all 0, that lie between two codes, and that are large or small."""
    C, K = 9, 32
    rope = Rope.table(C, K, 1e4, dtype, CPU)
    tables = rope.cos.to(DEVICE), rope.sin.to(DEVICE)
    halves = torch.arange(K) - K / 2 + 0.5
    halves[0] = 127
    for part in (torch.randn(H + 2 * G, K), torch.zeros(H + 2 * G, K), halves.expand(H + 2 * G, K)):
        for size in (1.0, 1e-3, 400.0):
            qkv = (part * size).to(dtype)
            k, v = (torch.full((G, C, K), 7, dtype=torch.int8) for _ in range(2))
            scales = [torch.full((G, C), 7.0) for _ in range(2)]
            expected = [t.clone() for t in (k, v, *scales)]
            turned = rope.at(4, 5)(qkv.view(1, H + 2 * G, 1, K)[:, : H + G])[0, :, 0]
            for n, rows in enumerate((turned[H:], qkv[H + G :])):
                expected[n][:, 4], expected[2 + n][:, 4] = encode(rows)
            there = [t.to(DEVICE) for t in (k, v, *scales)]
            q = rotate_and_append(qkv.view(1, -1).to(DEVICE), *tables, *there[:2], at(4), tuple(there[2:]))
            tolerance = size * 1e-6 if dtype == torch.float32 else 0
            torch.testing.assert_close(q.cpu(), turned[:H], rtol=1e-6, atol=tolerance)
            assert torch.equal(there[1].cpu(), expected[1]) and torch.equal(there[3].cpu(), expected[3])
            if dtype == torch.float32:  # rotated in another order of roundings
                torch.testing.assert_close(there[2].cpu(), expected[2])
                assert (there[0].cpu().int() - expected[0].int()).abs().max() <= 1
            else:
                assert torch.equal(there[0].cpu(), expected[0]) and torch.equal(there[2].cpu(), expected[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_is_a_number_where_one_of_its_token_is_not_finite(dtype: torch.dtype) -> None:
    H, G, C, K = 3, 2, 5, 16
    rope = Rope.table(C, K, 1e4, dtype, CPU)
    tables = rope.cos.to(DEVICE), rope.sin.to(DEVICE)
    for odd in (torch.nan, torch.inf, -torch.inf):
        for head in (H + 1, H + G + 1):  # a key, a value
            qkv = torch.randn(H + 2 * G, K).to(dtype)
            qkv[head, 3] = odd
            k, v = (torch.zeros(G, C, K, dtype=torch.int8, device=DEVICE) for _ in range(2))
            scales = torch.zeros(G, C, device=DEVICE), torch.zeros(G, C, device=DEVICE)
            rotate_and_append(qkv.view(1, -1).to(DEVICE), *tables, k, v, at(4), scales)
            values = decode(v[None], scales[1][None], dtype)[0]
            assert values[1, 4].isnan().all() and values[0, 4].isfinite().all() and not values[:, :4].any()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("H", "G", "K"), [(6, 2, 32), (2, 1, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_codes_has_the_bits_of_attention_to_what_they_stand_for(
    H: int, G: int, K: int, dtype: torch.dtype
) -> None:
    C = 150
    q = torch.randn(H, K).to(dtype)
    (k, ks), (v, vs) = (encode(torch.randn(1, G, C, K) * 3) for _ in range(2))
    for position in (0, 63, 64, C - 1):
        plain = [decode(k, ks, dtype), decode(v, vs, dtype)]
        expected = check_attention(q, *plain, position)
        for scale in (ks, vs):
            scale[:, :, position + 1 :] = torch.nan  # nobody has written there
        y = attend(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), at(position), (ks.to(DEVICE), vs.to(DEVICE)))
        assert torch.equal(y.cpu(), expected)
        (k, ks), (v, vs) = (encode(torch.randn(1, G, C, K) * 3) for _ in range(2))


# --- router


def choose(x: Tensor, gates: Tensor, E: int, A: int) -> tuple[Tensor, Tensor]:
    """The ids [A + d E] and the weights [A], apart."""
    choice = route(x.to(DEVICE), gates.to(DEVICE), E, A)
    assert choice.shape == (2 * A + len(gates) - E,) and choice.dtype == torch.int32
    return choice[A:], choice[:A].view(torch.float32)


def expected_route(x: Tensor, gates: Tensor, E: int, A: int) -> tuple[list[int], Tensor]:
    logits = (x.double() @ gates.double().T).view(-1, E)  # [1 + d, E]
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return order[0, :A].tolist() + order[1:].flatten().tolist(), logits[0, order[0, :A]].softmax(-1)


@pytest.mark.parametrize(
    ("E", "A", "d"),
    [
        (8, 2, 2),
        (8, 1, 0),
        (6, 6, 1),
        (1, 1, 3),
        (60, 4, 1),
        (12, 3, 2),
        (2, 1, 1),
        (2, 2, 0),
        (3, 2, 2),
        (5, 3, 1),
        (16, 2, 1),
        (16, 16, 1),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_route(E: int, A: int, d: int, dtype: torch.dtype) -> None:
    for D in (16, 300):
        x, gates = torch.randn(1, D).to(dtype), torch.randn((1 + d) * E, D)
        choice, weights = choose(x, gates, E, A)
        ids, expected = expected_route(x, gates, E, A)
        assert choice.tolist() == ids
        torch.testing.assert_close(weights.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_gate_does_not_depend_on_the_others() -> None:
    """Longer than a tile, and no multiple of one."""
    E, A, D = 8, 3, 4100
    x, gates = torch.randn(1, D, device=DEVICE).bfloat16(), torch.randn(3 * E, D, device=DEVICE) / 64
    choice, weights = choose(x, gates, E, A)
    assert choice.tolist() == expected_route(x.cpu(), gates.cpu(), E, A)[0]
    for layer in range(3):
        own, alone = choose(x, gates[layer * E : (layer + 1) * E], E, A)
        ranked = choice[:A] if layer == 0 else choice[A + (layer - 1) * E :][:A]
        assert torch.equal(own, ranked)
        if layer == 0:
            assert torch.equal(alone, weights)


def test_equal_logits() -> None:
    """The lower id first; 0 and -0 are equal."""
    x = torch.tensor([[1.0, 0.0]], device=DEVICE)
    gates = torch.tensor([[1.0, 0], [3, 0], [1, 0], [3, 0], [-0.0, 0], [0, 0]], device=DEVICE)
    choice, weights = choose(x, torch.cat([gates, gates.flip(0)]), 6, 6)
    assert choice.tolist() == [1, 3, 0, 2, 4, 5, 2, 4, 3, 5, 0, 1]
    assert weights[0] == weights[1] and weights[2] == weights[3] and weights[4] == weights[5]
    choice, weights = choose(x * 0, gates, 6, 2)
    assert choice.tolist() == [0, 1] and weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_ids_are_valid_whatever_the_logits(odd: float) -> None:
    x = torch.ones(1, 16, device=DEVICE)
    gates = torch.randn(12, 16, device=DEVICE)
    gates[[1, 3, 7]] = odd
    choice, _ = choose(x, gates, 6, 6)
    assert sorted(choice[:6].tolist()) == sorted(choice[6:].tolist()) == list(range(6))
    everywhere, _ = choose(x * float("nan"), gates, 6, 2)
    assert set(everywhere[:2].tolist()) <= set(range(6)) and everywhere[0] != everywhere[1]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_numbers_come_from_the_host(n: int) -> None:
    source = torch.arange(40, dtype=torch.int64, pin_memory=DEVICE == "cuda")[7 : 7 + n]
    target = torch.full((n + 2,), -1, dtype=torch.int64, device=DEVICE)
    fetch(source, target[1 : n + 1])
    assert target.tolist() == [-1, *range(7, 7 + n), -1]


@pytest.mark.parametrize("n", [1, 2, 6, 20, 33])
def test_numbers_go_to_the_host(n: int) -> None:
    source = torch.arange(40, dtype=torch.int32, device=DEVICE)[7 : 7 + n]
    target = torch.full((n + 2,), -1, dtype=torch.int32, pin_memory=DEVICE == "cuda")
    fetch(source, target[1 : n + 1])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert target.tolist() == [-1, *range(7, 7 + n), -1]


def test_the_device_launches_whichever_way_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(step, "launch", lambda *args, **values: None)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext(seen.append(t.device.type)))
    host, device = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32, device="meta")
    fetch(host, device)
    fetch(device, host)
    assert seen == ["meta", "meta"]
