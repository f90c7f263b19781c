"""The central test: with any slots, policy, guesses and delays, an offloaded engine writes bit for bit what a
resident one writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import DEMO

WIDTHS = (16, 4, 3, 2)
BOTH = ("float32", "bfloat16")


def cases(layers: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "slots": st.integers(2, 8) | st.lists(st.integers(2, 8), min_size=layers, max_size=layers),
            "policy": st.sampled_from(("lru", "lfu", "random", "static")),
            "lookahead": st.integers(0, 2),
            "prefetch": st.integers(0, 3),
        }
    )


def check(
    rig: Any, case: dict[str, Any], prompt: int, count: int, link: Any, sample: Callable[..., Any]
) -> None:
    """Compare the logits of a prompt, and `count` sampled tokens, over one cache."""
    ids = rig.ids(prompt)
    with rig.cached(**case, link=link) as cache:
        assert torch.equal(rig.engine.logits(ids), rig.logits(ids))
        assert sample(rig.engine, ids, count) == rig.tokens(ids, count)
        assert cache.ledger.counters.misses > 0
        held = [slot for table in cache.residency.tables for slot in table.slots]
        assert sorted(held + cache.residency.spares.free) == list(
            range(len(cache.residency.last_use))
        )  # none lost, none twice
        assert not cache.residency.spares.guesses and not cache.residency.tickets


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("bits", WIDTHS)
def test_bit_for_bit(rigs: Any, jitter: Any, sample: Any, bits: int, dtype: str) -> None:
    rig = rigs(bits, dtype)
    longest = rig.form.blob_bytes

    @settings(max_examples=14)
    @given(
        case=cases(rig.layers), prompt=st.sampled_from((1, 7, 200)), count=st.sampled_from((4,) * 9 + (128,)),
        seed=st.integers(0, 99),
    )  # fmt: skip
    def all_cases(case: dict[str, Any], prompt: int, count: int, seed: int) -> None:
        check(rig, case, prompt, count, jitter(seed, longest), sample)

    all_cases()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("bits", WIDTHS)
def test_bit_for_bit_on_the_demo(rigs: Any, jitter: Any, sample: Any, bits: int, dtype: str) -> None:
    rig = rigs(bits, dtype, source=DEMO)
    longest = rig.form.blob_bytes

    @settings(max_examples=64)
    @given(
        case=cases(rig.layers), prompt=st.sampled_from((1, 7, 200)), count=st.sampled_from((8,) * 7 + (128,)),
        seed=st.integers(0, 99),
    )  # fmt: skip
    def all_cases(case: dict[str, Any], prompt: int, count: int, seed: int) -> None:
        check(rig, case, prompt, count, jitter(seed, longest), sample)

    all_cases()


@pytest.mark.parametrize("bits", WIDTHS)
def test_several_tokens_sequences_and_chunks_at_once(rigs: Any, jitter: Any, bits: int) -> None:
    rig = rigs(bits)
    ids = torch.tensor([rig.ids(9, seed) for seed in range(4)])  # B = 4
    with torch.no_grad():
        expected = rig.resident.model(ids)
        for slots in (2, 5, 8):
            with rig.cached(slots, prefetch=2, link=jitter(slots, rig.form.blob_bytes)):
                assert torch.equal(rig.engine.model(ids), expected)


def test_a_wrong_byte_would_show(rig: Any) -> None:
    """The comparison can fail: here one expert's bytes in the arena differ."""
    ids = rig.ids(40)
    blob = rig.arena.berth(1 * rig.experts + 3)
    kept = blob.clone()
    blob.view(torch.float32).mul_(1.001)
    try:
        with rig.cached(4):
            assert not torch.equal(rig.engine.logits(ids), rig.logits(ids))
    finally:
        blob.copy_(kept)
