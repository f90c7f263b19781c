"""What the host learns from a router's choice."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.experts.needs import added_up, by_last_use, to_host


def test_what_goes_to_the_host_comes_back_apart() -> None:
    ids, ranking = torch.tensor([[2, 0], [1, 2], [3, 1]]), torch.tensor([[2, 1, 0, 3], [3, 1, 2, 0]])
    chosen, ahead = to_host(ids, ranking)
    assert chosen.tolist() == ids.tolist() and ahead == ranking.tolist()
    chosen, ahead = to_host(ids, None)
    assert chosen.tolist() == ids.tolist() and ahead == []


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 999))
def test_experts_of_the_last_tokens_come_last(tokens: int, A: int, seed: int) -> None:
    chosen = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :A].numpy()
    weights = torch.rand(tokens, A, generator=torch.Generator().manual_seed(seed))
    last = {e: n for n, row in enumerate(chosen.tolist()) for e in row}
    needed = by_last_use(chosen, 6)
    assert needed == sorted(last, key=lambda e: (last[e], e))
    for e, share in zip(needed, added_up(chosen, weights, needed), strict=True):
        assert share == pytest.approx(float(weights[torch.from_numpy(chosen) == e].sum()), rel=1e-5)
