"""Experts in slots, berths and files: with any number of each, the same bits as a resident model."""

import random
import time
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import Engine, EngineOptions
from runtime.experts.files import DiskLink, Extent

WIDTHS = (4, 3, 2)


class JitterDisk(DiskLink):
    """Sleeps at random, and reads pieces of random lengths."""

    def __init__(self, files: Any, seed: int) -> None:
        super().__init__(files)
        self.random = random.Random(seed)

    def move(self, source: Extent, target: torch.Tensor, demand: bool) -> None:
        if self.random.random() < 0.2:
            time.sleep(self.random.random() * 1e-3)
        super().move(source, target, demand)


def cases(layers: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "slots": st.integers(2, 8) | st.lists(st.integers(2, 8), min_size=layers, max_size=layers),
            "policy": st.sampled_from(("lru", "lfu", "random", "static")),
            "lookahead": st.integers(0, 2),
            "prefetch": st.integers(0, 3),
            "berths": st.integers(2, 24),
        }
    )


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("examples", [16, pytest.param(400, marks=pytest.mark.slow)])
def test_bit_for_bit(rigs: Any, jitter: Any, sample: Any, bits: int, dtype: str, examples: int) -> None:
    rig, moved = rigs(bits, dtype), Counter[str]()
    longest = rig.form.blob_bytes

    @settings(max_examples=examples)
    @given(
        case=cases(rig.layers), prompt=st.sampled_from((1, 7, 200)), count=st.sampled_from((4,) * 9 + (128,)),
        seed=st.integers(0, 99),
    )  # fmt: skip
    def all_cases(case: dict[str, Any], prompt: int, count: int, seed: int) -> None:
        ids = rig.ids(prompt)
        links = {"link": jitter(seed, longest), "back": jitter(seed + 1, longest)}
        with rig.cached(**case, **links, disk=lambda files: JitterDisk(files, seed)) as cache:
            cache.store.dropped = lambda layer, expert: moved.update(("dropped",))
            assert torch.equal(rig.engine.logits(ids), rig.logits(ids))
            assert sample(rig.engine, ids, count) == rig.tokens(ids, count)
            none_lost(cache)
            channels = cache.store.channels
            moved.update(
                read=channels.reads.moved, back=channels.back.moved, guesses=cache.count().used_guesses
            )

    all_cases()
    assert min(moved[what] for what in ("read", "back")) > 20 * longest
    assert min(moved[what] for what in ("dropped", "guesses")) > 10


def none_lost(cache: Any) -> None:
    """Every slot is a layer's or a spare, every berth is empty or holds one expert, nothing is under way."""
    residency, berths = cache.residency, cache.store.berths
    held = [slot for table in residency.tables for slot in table.slots]
    assert sorted(held + residency.spares.free) == list(range(len(residency.last_use)))
    assert not residency.spares.guesses and not residency.tickets
    assert sorted([*berths.where.values(), *berths.empty]) == list(range(berths.count))
    states = [*berths.singles, *berths.doubles, *berths.held]
    assert sorted(states) == sorted(berths.where) and not berths.held
    for expert in berths.where:
        layer, e = divmod(expert, cache.store.experts)
        assert (expert in berths.doubles) == (residency.tables[layer].find(e) is not None)


@pytest.mark.parametrize("misses", ["compute", "auto"])
def test_rates_are_measured_with_the_fewest_berths(rigs: Any, sample: Any, misses: str) -> None:
    """Loading leaves these berths empty."""
    rig = rigs(4, "bfloat16")
    options = EngineOptions(
        device="cpu", dtype="bfloat16", offload="always", slots=2, berths=2, misses=misses, threads=1
    )
    with Engine.load(rig.folder, options) as engine:
        assert engine.plan.cpu_gbps > 0 and engine.plan.link_gbps > 0
        assert sample(engine, rig.ids(9), 12) == rig.tokens(rig.ids(9), 12)
