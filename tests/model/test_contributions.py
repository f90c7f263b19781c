"""Sums that do not depend on the order of computing, against `mix` and plain arithmetic."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.moe import Contributions, ManyTokens, OneToken, mix
from model.router import Choice


def contributions(x: torch.Tensor, choice: Choice, experts: int) -> Contributions:
    if len(x) == 1:
        return OneToken(x, choice, choice.ids[0].tolist())
    return ManyTokens(x, choice, choice.ids.flatten().bincount(minlength=experts).tolist())


@given(
    tokens=st.integers(1, 9), A=st.integers(1, 4), seed=st.integers(0, 999),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)  # fmt: skip
def test_any_order_gives_the_bits_of_mix(tokens: int, A: int, seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    E, D = 6, 5
    x = torch.randn(tokens, D, generator=g).to(dtype)
    ids = torch.rand(tokens, E, generator=g).argsort(1)[:, :A]
    weights = torch.rand(tokens, A, generator=g).softmax(-1)
    matrices = torch.randn(E, D, D, generator=g).to(dtype)
    experts = [lambda x, m=m: x @ m for m in matrices]
    choice = Choice(ids, weights)
    sums = contributions(x, choice, E)
    chosen = [int(e) for e in torch.randperm(E, generator=g) if e in ids]
    for e in chosen:
        rows = [n for n in range(tokens) if e in ids[n]]
        assert torch.equal(sums.inputs(e), x[rows])
        sums.add(e, experts[e](sums.inputs(e)))
    total = sums.total()
    assert total.dtype == dtype and torch.equal(total, mix(experts, x, choice))
    slow = torch.stack(
        [sum(weights[n, a] * (x[n].float() @ matrices[ids[n, a]].float()) for a in range(A))
         for n in range(tokens)]
    )  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    assert torch.allclose(total.float(), slow, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_of_adding_is_fixed(order: tuple[int, ...]) -> None:
    """In float32, 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1, so the order shows."""
    values = {0: 1e8, 1: 1.0, 2: -1e8}
    for tokens in (1, 3):
        x, weights = torch.ones(tokens, 2), torch.ones(tokens, 3)
        ids = torch.arange(3).expand(tokens, 3)
        sums = contributions(x, Choice(ids, weights), 3)
        for e in order:
            sums.add(e, sums.inputs(e) * values[e])
        assert torch.equal(sums.total(), torch.zeros(tokens, 2))
