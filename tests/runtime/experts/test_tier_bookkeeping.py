"""Berths, counted again from a trace by a simulation that shares no code with the runtime: sources of misses,
drops, what was read and written back, and what is in berths in the end."""

import time
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.experts.trace import Drop, Guess, Miss, Read, UsedGuess, WastedGuess, WriteBack
from tests.runtime.experts.test_bookkeeping import POLICIES, Events, Layer, recount
from tests.runtime.experts.test_tiers import JitterDisk, none_lost

SPARE = 2
Expert = tuple[int, int]  # layer, expert


class Shelf:
    """The berths, as a list of what each expert there is. Who has been there for how long is in `order`."""

    def __init__(self, berths: int, layers: int, experts: int, policy: str) -> None:
        self.berths, self.experts = berths, experts
        self.state: dict[Expert, str] = {}
        self.lifted: list[Expert] = []  # the doubles, oldest first
        self.chooser = Layer(layers, 0, policy)  # one policy over all layers
        self.from_file: set[Expert] = set()  # guesses
        self.read, self.returned, self.dropped = list[Expert](), list[Expert](), list[Expert]()
        for n in sorted(range(layers * experts), key=lambda n: (n % experts, n))[: berths - SPARE]:
            self.arrive(divmod(n, experts), "single")

    def number(self, x: Expert) -> int:
        return x[0] * self.experts + x[1]

    def arrive(self, x: Expert, state: str) -> None:
        self.state[x] = state
        self.chooser.here.append(self.number(x))
        self.chooser.touch(self.number(x))

    def leave(self, x: Expert) -> None:
        del self.state[x]
        self.chooser.here.remove(self.number(x))

    def room(self) -> None:
        """Make sure that a berth is empty."""
        if len(self.state) < self.berths:
            return
        singles = [self.number(x) for x, state in self.state.items() if state == "single"]
        if len(self.lifted) > SPARE or not singles:
            self.leave(self.lifted.pop(0))
        else:
            gone = divmod(self.chooser.victim(singles), self.experts)
            self.leave(gone)
            self.dropped.append(gone)

    def may_guess(self, x: Expert) -> bool:
        """A guess makes no single go, and leaves enough berths for experts that are needed."""
        held = sum(state == "held" for state in self.state.values())
        free = len(self.state) < self.berths or len(self.lifted) > SPARE
        return held < self.berths - SPARE and (x in self.state or free)

    def guess(self, x: Expert) -> None:
        assert self.may_guess(x), x
        if x not in self.state:
            self.room()
            self.arrive(x, "held")
            self.from_file.add(x)
        self.state[x] = "held"

    def waste(self, x: Expert) -> None:
        assert self.state[x] == "held"
        if x in self.from_file:
            self.from_file.remove(x)
            self.leave(x)
        else:
            self.state[x] = "single"

    def miss(self, x: Expert, guessed: bool, evicted: Expert | None) -> str:
        """Returns where the expert was."""
        source = "host" if x in self.state else "file"
        if guessed:
            assert self.state[x] == "held"
            if x in self.from_file:
                self.from_file.remove(x)
                self.read.append(x)
        elif source == "file":
            self.room()
            self.arrive(x, "double")
            self.read.append(x)
        self.state[x] = "double"
        self.lifted.append(x)
        if evicted is not None:
            self.sink(evicted)
        return source

    def sink(self, x: Expert) -> None:
        if x in self.state:
            self.state[x] = "single"
            self.lifted.remove(x)
            self.chooser.touch(self.number(x))
        else:
            self.room()
            self.arrive(x, "single")
            self.returned.append(x)


def replay(events: Events, shelf: Shelf) -> None:
    """Carry out the events of the computing thread, in their order."""
    own = [event for event in events if isinstance(event, (Miss, Guess, UsedGuess, WastedGuess, Drop))]
    dropped: list[Expert] = []
    for n, event in enumerate(own):
        x = (event.layer, event.expert)
        if isinstance(event, Drop):
            dropped.append(x)
        elif isinstance(event, Guess):
            shelf.guess(x)
        elif isinstance(event, WastedGuess):
            shelf.waste(x)
        elif isinstance(event, Miss):
            guessed = n + 1 < len(own) and isinstance(own[n + 1], UsedGuess)
            evicted = None if event.evicted is None else (event.layer, event.evicted)
            assert event.source == shelf.miss(x, guessed, evicted), (n, event)
        if not isinstance(event, Drop):  # those come before the event that they make room for
            assert dropped == shelf.dropped, (n, event)


def agrees(rig: Any, cache: Any, shelf: Shelf, events: Events) -> None:
    """Check berths, their bytes, and what was moved."""
    berths, store = cache.store.berths, cache.store
    found = {divmod(key, rig.experts): "single" for key in berths.singles}
    found |= {divmod(key, rig.experts): "double" for key in berths.doubles}
    assert found == shelf.state and [divmod(key, rig.experts) for key in berths.doubles] == shelf.lifted
    deadline = time.monotonic() + 30
    while any(fill and fill.ticket and not fill.ticket.settled for fill in store.fills):
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    for key in berths.where:
        assert torch.equal(store.memory(key), rig.arena.berth(key)[: store.size]), key
    for engine in store.channels.all:
        engine.close()
    written = Counter((event.layer, event.expert) for event in events if isinstance(event, WriteBack))
    read = Counter((event.layer, event.expert) for event in events if isinstance(event, Read))
    assert written <= Counter(shelf.returned), "one whose berth was taken again may have been cut off"
    assert Counter(shelf.read) <= read, "and some that were guessed in vain"
    assert all(event.bytes == store.size for event in events if isinstance(event, Read | WriteBack))


def check(rig: Any, jitter: Any, sample: Any, case: dict[str, Any], prompt: int, seed: int) -> Shelf:
    events, slots = Events(), case["slots"]
    links = {"link": jitter(seed, rig.form.blob_bytes), "back": jitter(seed + 1, rig.form.blob_bytes)}
    with rig.cached(**case, **links, disk=lambda files: JitterDisk(files, seed)) as cache:
        shelf = Shelf(case["berths"], rig.layers, rig.experts, case["policy"])
        cache.record(events)
        for turn in range(2):
            sample(rig.engine, rig.ids(prompt, seed + turn), 20)
        none_lost(cache)
        recount(events, slots, case["policy"])  # hits, misses and victims do not depend on berths
        replay(events, shelf)
        agrees(rig, cache, shelf, events)
    return shelf


@pytest.mark.parametrize("policy", POLICIES)
def test_berths_are_as_described(rigs: Any, jitter: Any, sample: Any, policy: str) -> None:
    rig, shelves = rigs(4), list[Shelf]()

    @settings(max_examples=12)
    @given(
        slots=st.lists(st.integers(2, 5), min_size=rig.layers, max_size=rig.layers),
        berths=st.integers(2, 23), lookahead=st.integers(0, 2), prefetch=st.integers(0, 3),
        prompt=st.sampled_from((1, 9, 100)), seed=st.integers(0, 99),
    )  # fmt: skip
    def all_cases(prompt: int, seed: int, **case: Any) -> None:
        shelves.append(check(rig, jitter, sample, {"policy": policy, **case}, prompt, seed))

    all_cases()
    for what in ("read", "returned", "dropped"):
        assert sum(len(getattr(shelf, what)) for shelf in shelves) > 100, what


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_read_twice_if_slots_and_berths_have_room(rigs: Any, sample: Any, policy: str) -> None:
    """Three slots in each of three layers, and berths for the others and the spare ones. A prompt fills the
    slots. From then on, what was in memory once remains there."""
    rig, events, berths = rigs(4), Events(), 24 - 9 + SPARE
    shelf = Shelf(berths, rig.layers, rig.experts, policy)
    with rig.cached(3, policy, 2, 2, berths=berths) as cache:
        cache.record(events)
        sample(rig.engine, rig.ids(100), 2)
        replay(events, shelf)
        first = len(shelf.read)
        events.clear()
        shelf.dropped.clear()
        for seed in range(1, 5):
            sample(rig.engine, rig.ids(100, seed), 20)
        replay(events, shelf)
        assert sum(isinstance(event, Miss) for event in events) > 100 and first > 5 and not shelf.dropped
        assert max(Counter(shelf.read[first:]).values(), default=0) <= 1
