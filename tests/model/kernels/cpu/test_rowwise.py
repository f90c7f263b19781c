"""Attention and routing on a CPU, row by row: against PyTorch in float64, and bit for bit alone and among
others."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu import rowwise

pytest.importorskip("numba")
CPU = torch.device("cpu")


def reference(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:  # [T, H, K]
    """Written out, one row after the other, in float64."""
    (T, H, K), G = q.shape, k.shape[0]
    out = torch.zeros(T, H, K, dtype=torch.float64)
    for t in range(T):
        for h in range(H):
            g, n = h // (H // G), past + t + 1
            scores = k[g, :n].double() @ q[t, h].double() / math.sqrt(K)
            out[t, h] = scores.softmax(0) @ v[g, :n].double()
    return out


def text(G: int, C: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values in a part of larger memory, as in a KV cache."""
    return tuple(torch.randn(2, 1, G, C + 3, K).to(dtype)[:, 0, :, :C])  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("H", "G", "K"), [(8, 4, 32), (4, 4, 16), (8, 1, 64), (6, 2, 48), (32, 8, 128), (5, 1, 16)]
)
def test_attention(H: int, G: int, K: int, dtype: torch.dtype) -> None:
    r = random.Random(H * K)
    for T, past in ((1, 0), (1, 63), (1, 200), (5, 0), (33, 64), (70, 129)):
        k, v = text(G, past + T, K, dtype)
        q = (3 * torch.randn(T, H, K)).to(dtype)
        out = rowwise.attend_rows(q, [(k, v, past, T)])
        expected = reference(q, k, v, past)
        # The result is rounded once. Everything before is float32.
        assert (out.double() - expected).abs().max() <= 0.51 * torch.finfo(dtype).eps * v.abs().max()
        start, rows = 0, []
        while start < T:
            n = min(r.randint(1, 9), T - start)
            rows.append(rowwise.attend_rows(q[start : start + n], [(k, v, past + start, n)]))
            start += n
        assert torch.equal(torch.cat(rows), out)


def test_rows_of_several_texts() -> None:
    texts, queries, alone = [], [], []
    for past, T in ((0, 3), (700, 1), (17, 40), (15, 1), (16, 1)):
        k, v = text(4, past + T, 32, torch.bfloat16)
        queries.append(torch.randn(T, 8, 32).bfloat16())
        texts.append((k, v, past, T))
        alone.append(rowwise.attend_rows(queries[-1], texts[-1:]))
    assert torch.equal(rowwise.attend_rows(torch.cat(queries), texts), torch.cat(alone))


def test_scores_far_apart_and_values_that_are_not_numbers() -> None:
    k, v = text(1, 90, 16, torch.bfloat16)
    q = torch.full((1, 1, 16), 30.0).bfloat16()
    k[0, 40] = 100.0  # its score is 12,000: all others vanish
    assert torch.equal(rowwise.attend_rows(q, [(k, v, 89, 1)])[0, 0], v[0, 40])
    v[0, 3] = math.nan
    assert rowwise.attend_rows(q, [(k, v, 89, 1)]).isnan().all()
    assert rowwise.attend_rows(q, [(k, v, 2, 1)]).isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int) -> None:
    torch.manual_seed(1)
    k, v = text(8, 600, 128, torch.bfloat16)
    q = torch.randn(256, 32, 128).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = rowwise.attend_rows(q, [(k, v, 344, 256)])
    finally:
        torch.set_num_threads(before)
    for t in (0, 100, 255):
        assert torch.equal(out[t : t + 1], rowwise.attend_rows(q[t : t + 1], [(k, v, 344 + t, 1)]))


@pytest.mark.parametrize(("D", "E"), [(16, 2), (256, 8), (4096, 8), (320, 16)])
def test_routing(D: int, E: int) -> None:
    x, gates = torch.randn(37, D), torch.randn(E, D)
    out = rowwise.route(x, gates)
    torch.testing.assert_close(out, F.linear(x.double(), gates.double()).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat([rowwise.route(row, gates) for row in x.split([1, 5, 31])]), out)


def test_what_the_kernels_take(without_numba: str) -> None:
    assert not rowwise.takes(torch.bfloat16, CPU, 128, 4)


def test_shapes_and_dtypes_that_the_kernels_do_not_take() -> None:
    assert rowwise.takes(torch.bfloat16, CPU, 128, 4) and rowwise.takes(torch.float16, CPU, 16, 8)
    assert not rowwise.takes(torch.float32, CPU, 128, 4)
    assert not rowwise.takes(torch.bfloat16, CPU, 40, 4) and not rowwise.takes(torch.bfloat16, CPU, 128, 9)
    assert not rowwise.takes(torch.bfloat16, torch.device("cuda"), 128, 4)
