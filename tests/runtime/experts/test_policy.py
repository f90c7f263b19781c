"""Eviction policies, compared with definitions that keep the whole history."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Engine, EngineOptions, OptionError, SamplingParams
from runtime.experts.policy import LFU, LRU, POLICIES, Policy, PolicyMaker, Random, Static, make_policy
from tools.trace.read import read_trace

ACCESSES = st.lists(st.integers(0, 7), min_size=1, max_size=60)
HALF_LIFE = 8


def lru(history: list[int], arrivals: dict[int, int], candidates: set[int]) -> int:
    last = {e: max(i for i, used in enumerate(history) if used == e) for e in candidates}
    return min(candidates, key=lambda e: last[e])


def lfu(history: list[int], arrivals: dict[int, int], candidates: set[int]) -> int:
    """Each access weighs a half for every multiple of the half-life between it and now."""
    now = len(history) // HALF_LIFE
    weights = {
        e: sum(2.0 ** (i // HALF_LIFE - now) for i, used in enumerate(history) if used == e)
        for e in candidates
    }
    last = {e: max(i for i, used in enumerate(history) if used == e) for e in candidates}
    return min(candidates, key=lambda e: (weights[e], last[e]))


def static(history: list[int], arrivals: dict[int, int], candidates: set[int]) -> int:
    return max(candidates, key=lambda e: arrivals[e])


@pytest.mark.parametrize(
    ("policy", "definition"), [(LRU, lru), (lambda: LFU(HALF_LIFE), lfu), (Static, static)]
)
@given(accesses=ACCESSES, slots=st.integers(1, 7), data=st.data())
def test_victims_are_as_defined(
    policy: Callable[[], Policy],
    definition: Callable[[list[int], dict[int, int], set[int]], int],
    accesses: list[int],
    slots: int,
    data: st.DataObject,
) -> None:
    """A cache of `slots` experts. Any of them may be pinned, and so is no candidate."""
    chooser, history, arrivals = policy(), list[int](), dict[int, int]()
    for i, expert in enumerate(accesses):
        if expert not in arrivals and len(arrivals) == slots:
            candidates = data.draw(st.sets(st.sampled_from(sorted(arrivals)), min_size=1))
            victim = chooser.victim(candidates)
            assert victim == definition(history, arrivals, candidates)
            chooser.evicted(victim)
            del arrivals[victim]
        chooser.used(expert)
        history.append(expert)
        arrivals.setdefault(expert, i)


def test_lfu_lets_go_of_what_was_long_ago() -> None:
    def victim(half_life: int) -> int:
        policy = LFU(half_life)
        for expert in [0] * 50 + [1, 2] * 20:
            policy.used(expert)
        return policy.victim({0, 1, 2})

    assert victim(half_life=8) == 0
    assert victim(half_life=10_000) == 1


def test_random_is_even_and_repeats_only_by_seed_and_layer() -> None:
    def victims(seed: int, layer: int) -> list[int]:
        policy = Random(seed, layer)
        return [policy.victim({1, 3, 4, 6}) for _ in range(4000)]

    drawn = victims(1, 2)
    assert victims(1, 2) == drawn
    assert all(900 < drawn.count(e) < 1100 for e in (1, 3, 4, 6))
    for other in (victims(2, 1), victims(1, 3), victims(3, 2)):
        assert 0.2 < sum(a == b for a, b in zip(drawn, other, strict=True)) / 4000 < 0.3
    assert 0.2 < sum(a == b for a, b in pairwise(drawn)) / 4000 < 0.3


@given(st.sampled_from(sorted(POLICIES)), ACCESSES)
def test_an_expert_that_was_evicted_can_come_again(name: str, accesses: list[int]) -> None:
    policy = make_policy(name, seed=0, layer=0)
    for expert in accesses:
        policy.used(expert)
        policy.evicted(expert)
    policy.used(8)
    policy.used(9)
    assert policy.victim({8, 9}) in (8, 9)
    policy.evicted(8)
    policy.used(8)
    if name == "static":
        assert policy.victim({8, 9}) == 8


def test_an_unknown_policy_is_refused_with_what_there_is() -> None:
    with pytest.raises(OptionError, match="policy is 'mru', and must be one of lru, lfu, random, static"):
        make_policy("mru", seed=0, layer=0)


def test_a_policy_of_ones_own(load: Callable[..., Engine], tmp_path: Path) -> None:
    """An engine makes one for each layer, asks it for victims, and calls it by its name in traces."""
    made = []

    class Mine(LRU):
        def __init__(self, seed: int, layer: int) -> None:
            super().__init__()
            made.append((seed, layer))

    def misses(policy: str | PolicyMaker) -> int:
        engine = load(slots=3, lookahead=0, policy=policy)
        with engine.recording(tmp_path / "trace.jsonl"):
            for _ in engine.generate("def alpha_", SamplingParams(max_new_tokens=20, temperature=0)):
                pass
        return engine.stats().misses

    assert misses(Mine) == misses("lru") != misses("static")
    assert made == [(0, 0), (0, 1)]
    misses(Mine)
    assert read_trace(tmp_path / "trace.jsonl").header.policy == "Mine"
    with pytest.raises(OptionError, match=r"policy is 3, and must be one of lru, lfu, random, static"):
        EngineOptions(policy=3)  # type: ignore[arg-type]


def test_a_function_that_makes_no_policy_is_an_option_error() -> None:
    with pytest.raises(OptionError, match=r"policy is .*no seed and layer"):
        make_policy(lambda: LRU(), 0, 0)  # type: ignore[arg-type]
