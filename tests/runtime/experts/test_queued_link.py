"""A link that takes copies and does them later, as a GPU's stream does, so the computing thread puts demanded
copies there itself. Tokens, hits, misses and bytes stay the same, and guesses delay little."""

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from runtime.experts.link import HostLink
from runtime.experts.tickets import TransferError
from tests.runtime.experts.test_bookkeeping import Events, agree, recount

COUNT = 12


class QueuedLink(HostLink):
    """A stream is a thread that does one copy after the other. A mark is set when the thread comes to it. A
    CPU has computed when the call returns, so no copy needs to wait for a slot to be free."""

    def __init__(self, piece: int, seed: int = 0, staged: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self.piece, self.random, self.staged = piece, random.Random(seed), staged
        self.work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.log: list[tuple[str, bool, int, int]] = []  # thread, demand, target, guesses under way
        self.guesses: list[threading.Event] = []
        self.fails: Callable[[int], bool] = lambda n: False
        self.stream = threading.Thread(target=self.run, daemon=True)
        self.stream.start()

    def run(self) -> None:
        while (do := self.work.get()) is not None:
            do()
            if self.random.random() < 0.05:
                time.sleep(self.random.random() * 5e-4)

    def blocks(self, source: Tensor) -> bool:
        return self.staged is not None and self.staged(source)

    def prepare(self, source: Tensor, demand: bool) -> Tensor:
        if not demand and len(self.guesses) > 1:
            self.guesses[-2].wait()
        return source.clone() if self.blocks(source) else source

    def move(self, source: Tensor, target: Tensor, demand: bool) -> threading.Event:  # type: ignore[override]
        before = sum(not mark.is_set() for mark in self.guesses[-3:])
        self.log.append((threading.current_thread().name, demand, target.data_ptr(), before))
        if self.fails(len(self.log)):
            raise OSError("the bus is on strike")
        if demand and self.random.random() < 0.2:
            time.sleep(1e-4)  # time enough for a guess to come in between, if it may
        mark = threading.Event()
        self.work.put(partial(target.copy_, source))
        self.work.put(mark.set)
        if not demand:
            self.guesses.append(mark)
        return mark

    def reached(self, mark: threading.Event) -> None:
        mark.wait()

    def close(self) -> None:
        self.work.put(None)
        self.stream.join()


@pytest.fixture(params=["all", "some"])
def make_link(rigs: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., QueuedLink]]:
    """Makes a link to an arena that is page-locked in `all` of its parts or in `some`."""
    rig = rigs(4)
    middle = rig.arena.berth(rig.experts + 4).data_ptr()

    def unlocked(source: Tensor) -> bool:
        return source.data_ptr() >= middle

    def make(seed: int = 0, pieces: int = 4) -> QueuedLink:
        size = -(-rig.form.blob_bytes // pieces)
        return QueuedLink(size, seed, unlocked if request.param == "some" else None)

    yield make


@pytest.mark.parametrize(("slots", "lookahead", "prefetch"), [(2, 0, 0), (2, 1, 2), (3, 2, 3), (5, 2, 1)])
def test_tokens_and_accounts_are_the_same(
    rigs: Any, sample: Any, make_link: Callable[..., QueuedLink], slots: int, lookahead: int, prefetch: int
) -> None:
    rig = rigs(4)
    for seed, prompt in enumerate((1, 60)):
        events, link = Events(), make_link(seed)
        with rig.cached(slots, "lru", lookahead, prefetch, link) as cache:
            cache.record(events)
            for turn in range(2):
                ids = rig.ids(prompt, seed + turn)
                assert sample(rig.engine, ids, COUNT) == rig.tokens(ids, COUNT)
            recount(events, [slots] * rig.layers, "lru")
            agree(rig, cache, events)
        if link.staged is None:
            here, late = threading.current_thread().name, 0
            for who, demand, _, _ in link.log:
                late += demand and who != here
                assert demand or who != here
            # A piece of a guess that came true while the copy thread was about to put it there.
            assert late <= cache.ledger.counters.used_guesses


def test_a_needed_expert_waits_for_two_pieces_of_guesses(
    rigs: Any, sample: Any, make_link: Callable[..., QueuedLink]
) -> None:
    rig, link = rigs(4), make_link(pieces=6)
    with rig.cached(2, "lru", 2, 3, link) as cache:
        assert sample(rig.engine, rig.ids(9), 3 * COUNT) == rig.tokens(rig.ids(9), 3 * COUNT)
        assert cache.ledger.counters.used_guesses > 0
    assert max(before for _, demand, _, before in link.log if demand) <= 2
    assert max(before for _, demand, _, before in link.log if not demand) <= 1  # and itself
    if link.staged is None:  # the pieces of one expert follow each other: no guess comes in between
        runs = [(target, demand) for _, demand, target, _ in link.log]
        between = range(1, len(runs) - 1)
        assert all(runs[n][1] or not runs[n - 1][1] or runs[n - 1] != runs[n + 1] for n in between)


def test_failures_are_the_request_s_that_needed_it(
    rigs: Any, sample: Any, make_link: Callable[..., QueuedLink]
) -> None:
    rig, failed = rigs(4), 0
    prompt = rig.ids(3)
    for k in range(1, 80, 7):
        link = make_link(k)
        link.fails = lambda n, k=k: n == k  # type: ignore[misc]
        with rig.cached(3, "lru", 2, 2, link):
            try:
                assert sample(rig.engine, prompt, COUNT) == rig.tokens(prompt, COUNT)
            except TransferError as error:
                assert "could not be copied to the device (the bus is on strike)" in str(error)
                failed += 1
            assert sample(rig.engine, prompt, COUNT) == rig.tokens(prompt, COUNT)
    assert failed > 3
