"""Reads from files: what goes first, and how soon an expert can be computed that is only in its file."""

import threading
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pytest
import torch

from runtime.experts import files as module
from runtime.experts.files import DIRECT, DiskLink, ExpertFiles, Extent, OpenFile


class Turnstile:
    """Lets one read pass at a time."""

    def __init__(self) -> None:
        self.may, self.asked = threading.Semaphore(0), threading.Semaphore(0)
        self.original = module.read_at

    def __call__(self, file: OpenFile, memory: memoryview, offset: int) -> int:
        self.asked.release()
        assert self.may.acquire(timeout=30)
        return self.original(file, memory, offset)


@pytest.fixture
def turnstile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Turnstile]:
    turnstile = Turnstile()
    monkeypatch.setattr(module, "read_at", turnstile)
    yield turnstile
    turnstile.may.release(1000)


@pytest.fixture
def tier(rigs: Any, turnstile: Turnstile) -> Iterator[tuple[Any, Callable[[int], list[int]]]]:
    """A cache over three tiers that reads block by block, and a function that lists a layer's experts that
    are only in files."""

    def blocks(files: ExpertFiles) -> DiskLink:
        disk = DiskLink(files)
        disk.piece = DIRECT
        return disk

    rig = rigs(4)
    with rig.cached(3, berths=7, lookahead=1, prefetch=2, disk=blocks) as cache:
        yield cache, lambda layer: [e for e in range(rig.experts) if cache.store.source(layer, e) == "file"]
        turnstile.may.release(1000)


def blocks_of(cache: Any, layer: int, expert: int, count: int) -> int:
    """How many reads have the first `count` bytes of an expert."""
    return -(-(cache.store.files.shift(layer, expert) + count) // DIRECT)


def test_the_first_matrices_can_be_computed_while_the_last_is_read(
    rigs: Any, tier: Any, turnstile: Turnstile
) -> None:
    cache, absent = tier
    first, size = cache.first_bytes, cache.store.size
    reads = {
        (n, e): (blocks_of(cache, n, e, first), blocks_of(cache, n, e, size))
        for n in (0, 1, 2)
        for e in absent(n)
    }
    layer, e = next(x for x, (some, every) in reads.items() if some < every)
    slot, *_ = cache.residency.bring_in(layer, e, "demand")
    ticket, expected = cache.residency.tickets[slot], rigs(4).arena.berth(layer * rigs(4).experts + e)
    turnstile.may.release(reads[layer, e][0])
    cache.copies.wait(ticket, first)
    assert first <= ticket.moved < size
    assert torch.equal(cache.pool[slot, :first], expected[:first])
    turnstile.may.release(1000)
    cache.copies.wait(ticket)
    assert torch.equal(cache.pool[slot, :size], expected[:size])


def test_what_is_needed_is_read_before_what_is_guessed(tier: Any, turnstile: Turnstile) -> None:
    """A guess that comes true overtakes others, and so does an expert that was not guessed. Both wait for no
    more than the piece under way."""
    cache, absent = tier
    residency, store = cache.residency, cache.store
    disk, log = store.channels.reads.link, list[Extent]()
    move = disk.move
    disk.move = lambda source, *rest: (log.append(source), move(source, *rest))
    one, other, *_ = absent(1)
    for e in (one, other):
        label = residency.label(1, e, "guess")
        store.claim(label)
        residency.send(label, residency.spares.take(1, e).slot)
        if e == one:
            assert turnstile.asked.acquire(timeout=30)  # its first piece is under way
    slots = [residency.bring_in(1, other, "demand")[0]]
    needed = absent(2)[0]
    slots.append(residency.bring_in(2, needed, "demand")[0])
    turnstile.may.release(1000)
    for slot in [*slots, residency.spares.find(1, one).slot]:
        cache.copies.wait(residency.tickets[slot])
    order = [
        key for part in log for key, whole in store.files.extents.items()
        if part.file is whole.file and 0 <= part.offset - whole.offset < whole.bytes
    ]  # fmt: skip
    assert len(order) == len(log) and [key for key, _ in groupby(order)] == [
        (1, one),
        (1, other),
        (2, needed),
        (1, one),
    ]
