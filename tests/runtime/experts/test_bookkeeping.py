"""Hits, misses, victims and bytes, counted again from the trace by a simulation that shares no code with the
runtime."""

import random
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.experts.link import HostLink
from runtime.experts.trace import (
    Copy,
    Event,
    Guess,
    Hit,
    Miss,
    Ranking,
    Routing,
    Stall,
    UsedGuess,
    WastedGuess,
)

POLICIES = ("lru", "lfu", "random", "static")


class Layer:
    """One layer's slots under one policy, spelled out: every expert's history, and one `min` or draw."""

    def __init__(self, number: int, slots: int, policy: str) -> None:
        self.slots, self.policy = slots, policy
        self.here: list[int] = []  # in order of arrival
        self.time = 0
        self.last: dict[int, int] = {}
        self.count: Counter[int] = Counter()
        self.chance = random.Random(f"0 {number}")

    def touch(self, e: int) -> None:
        self.time += 1
        self.last[e] = self.time
        self.count[e] += 1 << 64  # so that halves stay whole
        if self.time % 32 == 0:
            self.count = Counter({e: n // 2 for e, n in self.count.items()})

    def victim(self, candidates: list[int]) -> int:
        if self.policy == "lru":
            return min(candidates, key=lambda e: self.last[e])
        if self.policy == "lfu":
            return min(candidates, key=lambda e: (self.count[e], self.last[e]))
        if self.policy == "static":
            return max(candidates, key=self.here.index)
        return sorted(candidates)[self.chance.randrange(len(candidates))]

    def step(self, needed: tuple[int, ...]) -> list[tuple[str, int, int | None]]:
        log: list[tuple[str, int, int | None]] = []
        present = [e for e in needed if e in self.here]
        for e in present:
            log.append(("hit", e, None))
            self.touch(e)
        busy = deque(present)  # computed in this order, and given away once computed
        for e in needed:
            if e in present:
                continue
            gone = None
            if len(self.here) == self.slots:
                if len(busy) == self.slots:
                    busy.popleft()
                gone = self.victim([c for c in self.here if c not in busy])
                self.here.remove(gone)
            self.here.append(e)
            self.touch(e)
            busy.append(e)
            log.append(("miss", e, gone))
        return log


def recount(events: Any, slots: list[int], policy: str) -> None:
    """Check every hit, miss and victim, in the order of the trace."""
    layers = [Layer(number, count, policy) for number, count in enumerate(slots)]
    expected, found = [], []
    for event in events:
        if isinstance(event, Routing):
            log = layers[event.layer].step(event.experts)
            expected += [(event.step, event.layer, *line) for line in log]
        elif isinstance(event, Hit):
            found.append((event.step, event.layer, "hit", event.expert, None))
        elif isinstance(event, Miss):
            found.append((event.step, event.layer, "miss", event.expert, event.evicted))
    assert found == expected and found


@pytest.mark.parametrize("policy", POLICIES)
def test_hits_misses_and_victims_are_those_of_the_policy(
    rigs: Any, jitter: Any, sample: Any, policy: str
) -> None:
    rig = rigs(4)

    @settings(max_examples=8)
    @given(
        slots=st.lists(st.integers(2, 8), min_size=rig.layers, max_size=rig.layers),
        lookahead=st.integers(0, 2), prefetch=st.integers(0, 3), prompt=st.sampled_from((1, 9, 100)),
        seed=st.integers(0, 99),
    )  # fmt: skip
    def all_cases(slots: list[int], lookahead: int, prefetch: int, prompt: int, seed: int) -> None:
        events = Events()
        link = jitter(seed, rig.form.blob_bytes)
        with rig.cached(slots, policy, lookahead, prefetch, link) as cache:
            cache.record(events)
            for turn in range(2):
                sample(rig.engine, rig.ids(prompt, seed + turn), 20)
            recount(events, slots, policy)
            agree(rig, cache, events)

    all_cases()


class Events(list[Event]):
    def add(self, event: Event) -> None:
        self.append(event)


def agree(rig: Any, cache: Any, events: Any) -> None:
    """Check that the statistics say what the trace says."""
    cache.copies.close()
    stats, size = rig.engine.stats(), cache.store.size
    count = Counter(type(event) for event in events)
    assert (stats.hits, stats.misses) == (count[Hit], count[Miss])
    assert (stats.guesses, stats.used_guesses) == (count[Guess], count[UsedGuess])
    assert count[Guess] == count[UsedGuess] + count[WastedGuess]
    assert stats.stall_seconds == pytest.approx(sum(e.seconds for e in events if isinstance(e, Stall)))
    missed = {(e.step, e.layer, e.expert) for e in events if isinstance(e, Miss)}
    assert {(e.step, e.layer, e.expert) for e in events if isinstance(e, UsedGuess)} <= missed
    assert all(e.bytes == size for e in events if isinstance(e, Copy))
    # needed experts crossed whole, and the wasted counter has the rest
    assert stats.copied_bytes == count[Miss] * size + stats.wasted_bytes
    wasted = sum(e.bytes for e in events if isinstance(e, WastedGuess))
    assert wasted <= stats.wasted_bytes <= wasted + count[WastedGuess] * size  # pieces under way included
    demanded = [(e.step, e.layer, e.expert) for e in events if isinstance(e, Copy) and e.kind == "demand"]
    assert len(demanded) == len(set(demanded)) == count[Miss] - count[UsedGuess]
    assert stats.hits + stats.misses == sum(len(e.experts) for e in events if isinstance(e, Routing))
    recalled(stats, events)


def recalled(stats: Any, events: Any) -> None:
    """Recall, from routings and the rankings of one layer before."""
    ranked: dict[tuple[int, int], tuple[int, ...]] = {}
    hit = all_of_them = 0
    for event in events:
        if isinstance(event, Ranking) and event.distance == 1:
            ranked[event.step, event.layer] = event.experts
        if isinstance(event, Routing) and event.tokens == 1 and (event.step, event.layer) in ranked:
            first = ranked[event.step, event.layer][: len(event.experts)]
            hit += len(set(first) & set(event.experts))
            all_of_them += len(event.experts)
    assert (stats.recalled, stats.recallable) == (hit, all_of_them)


class Patient(HostLink):
    """Copies an expert in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.piece = 1 << 30


def test_bytes_are_misses_and_guesses_times_the_blob(rig: Any, events: Any, sample: Any) -> None:
    """In a link that copies every guess whole before it can be dropped."""
    with rig.cached(3, prefetch=2, lookahead=2, link=Patient()) as cache:
        guess = cache.residency.guess

        def then_wait(*args: Any) -> None:
            guess(*args)
            for ticket in list(cache.residency.tickets.values()):
                cache.copies.wait(ticket)

        cache.residency.guess = then_wait
        cache.record(events)
        assert sample(rig.engine, rig.ids(9), 40) == rig.tokens(rig.ids(9), 40)
        stats, size = rig.engine.stats(), cache.store.size
        assert stats.guesses > stats.used_guesses > 0
        assert stats.copied_bytes == (stats.misses - stats.used_guesses + stats.guesses) * size
        assert stats.wasted_bytes == (stats.guesses - stats.used_guesses) * size
        assert sum(event.bytes for event in events.of(WastedGuess)) == stats.wasted_bytes


def test_bytes_are_the_sum_of_pieces(rig: Any, faulty: Any, sample: Any) -> None:
    link = faulty(lambda n, demand: False, piece=rig.form.blob_bytes // 7)
    with rig.cached(2, prefetch=3, lookahead=2, link=link) as cache:
        sample(rig.engine, rig.ids(9), 40)
        cache.copies.close()
        stats = rig.engine.stats()
        assert stats.copied_bytes == sum(size for size, _ in link.pieces)
        assert stats.wasted_bytes == stats.copied_bytes - stats.misses * cache.store.size > 0


@pytest.mark.parametrize("slots", [2, 3, 5, 8])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_prompt_takes_each_expert_across_once(rig: Any, events: Any, slots: int, lookahead: int) -> None:
    with rig.cached(slots, lookahead=lookahead, prefetch=2) as cache:
        cache.record(events)
        rig.engine.logits(rig.ids(200))
        cache.copies.close()
        copies = Counter((e.step, e.layer, e.expert) for e in events.of(Copy))
        needed = {(r.step, r.layer, e) for r in events.of(Routing) for e in r.experts}
        assert set(copies) <= needed | {(g.step, g.layer, g.expert) for g in events.of(Guess)}
        assert max(copies.values()) == 1
        assert len(needed) > rig.layers * 6  # a long prompt does need most
        assert rig.engine.stats().copied_bytes <= rig.layers * rig.experts * rig.form.blob_bytes


def test_decoding_finds_the_last_tokens_experts(rig: Any, events: Any) -> None:
    ids = rig.ids(100)
    with rig.cached(2, lookahead=0) as cache:
        rig.engine.logits(ids)
        cache.record(events)
        session = rig.engine.session()
        rig.engine.runner.forward(ids[:1], session.kv)
        session.close()
        held = [set(table.where) for table in cache.residency.tables]
        chosen = [set(routing.experts) for routing in events.of(Routing)]
        assert held == chosen and all(len(experts) == 2 for experts in held)


def test_statistics_add_up_over_a_reset_by_an_error(rig: Any, faulty: Any, events: Any, sample: Any) -> None:
    link = faulty(lambda n, demand: n == 60, piece=rig.form.blob_bytes // 3)
    with rig.cached(3, prefetch=2, link=link) as cache:
        cache.record(events)
        with pytest.raises(Exception, match="could not be copied"):
            sample(rig.engine, rig.ids(9), 40)
        assert sample(rig.engine, rig.ids(9), 40) == rig.tokens(rig.ids(9), 40)
        cache.copies.close()
        stats = rig.engine.stats()
        assert len(events.of(Guess)) == len(events.of(UsedGuess)) + len(events.of(WastedGuess))
        assert stats.copied_bytes == sum(size for size, _ in link.pieces) - link.pieces[60][0]
        first = events.of(Routing)[-1].step  # of the second request, the slots were empty at its start
        assert first > 0 and stats.misses == len(events.of(Miss))
