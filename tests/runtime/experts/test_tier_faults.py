"""Reads, copies back and copies to the device that fail, in three tiers: one clear line, no wrong token
before it, and a right answer to the next request."""

import errno
import gc
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from runtime.experts import files as module
from runtime.experts.files import DIRECT, DiskLink, ExpertFiles, OpenFile
from runtime.experts.link import HostLink
from runtime.experts.split import Split
from runtime.experts.tickets import Ticket, TransferError
from tests.leftovers import until
from tests.runtime.experts.test_faults import taken
from tests.runtime.experts.test_tiers import none_lost

COUNT = 10
CASE: dict[str, Any] = {"slots": 2, "berths": 7, "lookahead": 2, "prefetch": 2}
Reader = Callable[[OpenFile, memoryview, int], int]


class Reads:
    """Stands in for `read_at`. Numbers the reads, and asks `spoil` what becomes of each: None lets it pass, a
    number cuts it to so many bytes, an error is raised."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()
        self.spoil: Callable[[int], int | OSError | None] = lambda n: None
        self.original = module.read_at

    def __call__(self, file: OpenFile, memory: memoryview, offset: int) -> int:
        with self.lock:
            n, self.count = self.count, self.count + 1
        spoiled = self.spoil(n)
        if isinstance(spoiled, OSError):
            memory[: len(memory) // 2] = b"\xff" * (len(memory) // 2)  # what did arrive is wrong
            raise spoiled
        count = self.original(file, memory, offset)
        return count if spoiled is None else min(count, spoiled)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()
    monkeypatch.setattr(module, "read_at", reads)
    return reads


def small(files: ExpertFiles) -> DiskLink:
    """Several pieces for each expert."""
    disk = DiskLink(files)
    disk.piece = 2 * DIRECT
    return disk


def ends_in_a_line(rig: Any, prompt: list[int], mend: Callable[[], None], *lines: str) -> bool:
    """Make a request that may fail, mend what fails, and make it again. Returns whether the first failed."""
    expected = rig.tokens(prompt, COUNT)
    got, error = taken(rig.engine, prompt, COUNT)
    mend()
    assert got == expected[: len(got)]
    if error is None:
        assert len(got) == COUNT
    else:
        assert isinstance(error, TransferError) and "\n" not in str(error)
        assert any(line in str(error) for line in lines), error
    assert taken(rig.engine, prompt, COUNT) == (expected, None)
    return error is not None


@pytest.mark.parametrize("lookahead", [0, 2])
def test_every_read_may_be_the_one_that_fails(rigs: Any, reads: Reads, lookahead: int) -> None:
    rig, failed, n = rigs(4), 0, 0
    prompt = rig.ids(3)
    with rig.cached(**CASE | {"lookahead": lookahead}, disk=small) as cache:
        for n in (*range(10), *range(10, 400, 37)):
            reads.count = 0
            reads.spoil = lambda k, n=n: OSError(errno.EIO, os.strerror(errno.EIO)) if k == n else None
            line = ".safetensors: Input/output error; try again"
            failed += ends_in_a_line(rig, prompt, lambda: setattr(reads, "spoil", lambda k: None), line)
            none_lost(cache)
    assert failed > 8, "not if it was that of a wrong guess"


def test_reads_that_come_short_go_on_or_say_so(rigs: Any, reads: Reads) -> None:
    rig, chance, failed = rigs(4), random.Random(0), 0
    prompt = rig.ids(3)
    expected = rig.tokens(prompt, COUNT)
    with rig.cached(**CASE, disk=small):
        reads.spoil = lambda k: chance.choice((None, DIRECT, DIRECT + 5))
        assert taken(rig.engine, prompt, COUNT) == (expected, None)
        for n in range(0, 40, 3):
            reads.count, reads.spoil = 0, lambda k, n=n: 0 if k == n else None
            mend = lambda: setattr(reads, "spoil", lambda k: None)  # noqa: E731
            failed += ends_in_a_line(rig, prompt, mend, "bytes early; load the model again")
    assert failed > 5


@pytest.mark.parametrize(("direction", "delay"), [("link", 0.0), ("back", 0.0), ("back", 0.02)])
def test_every_piece_on_the_link_may_be_the_one_that_fails(
    rigs: Any, faulty: Any, direction: str, delay: float
) -> None:
    """Half of a piece is overwritten with garbage by then. What did not get back to its berth is in the file,
    so it is read again, unless a copy to the device has begun to wait for it."""
    rig, failed, spoiled = rigs(4), 0, 0
    prompt, piece = rig.ids(3), rig.form.blob_bytes // 2
    for n in (*range(8), *range(8, 130, 17)):

        def fails(k: int, demand: bool, n: int = n) -> bool:
            time.sleep(delay * (k == n))
            return k == n

        link = faulty(fails, piece)
        with rig.cached(**CASE | {"prefetch": 3}, **{direction: link}) as cache:
            mend = lambda link=link: setattr(link, "fails", lambda k, demand: False)  # noqa: E731
            line = "an expert could not be copied to the device (the bus is on strike); try again"
            failed += ends_in_a_line(rig, prompt, mend, line)
            none_lost(cache)
        spoiled += len(link.pieces) > n
    assert spoiled > 11 and (failed > 3 if direction == "link" else failed < 12)


def test_half_of_everything_fails(rigs: Any, reads: Reads, faulty: Any) -> None:
    rig, chance, rate = rigs(4), random.Random(0), [0.0]
    prompt, piece = rig.ids(2), rig.form.blob_bytes // 2
    link, back = (faulty(lambda n, demand: chance.random() < rate[0], piece) for _ in (0, 1))
    reads.spoil = lambda n: OSError(5, "gone") if chance.random() < rate[0] else None
    outcomes = []
    with rig.cached(**CASE, link=link, back=back, disk=small) as cache:
        for turn in range(45):
            rate[0] = (0.0, 0.01, 0.5)[turn % 3]
            got, error = taken(rig.engine, prompt, COUNT, seed=turn % 2)
            assert got == rig.tokens(prompt, COUNT, turn % 2)[: len(got)]
            outcomes.append(error is None)
            if error is None:
                none_lost(cache)
        assert all(outcomes[::3]) and not any(outcomes[2::3])


@pytest.mark.parametrize("copy", [0.5, 1.5])  # against 1.0 to compute an expert
def test_reads_that_fail_while_the_host_computes(rigs: Any, reads: Reads, sample: Any, copy: float) -> None:
    """Without guesses, who computes an expert depends on slots alone, which are empty at first."""
    rig, failed, prompt = rigs(4), 0, rigs(4).ids(3)
    with rig.cached(2, berths=5, lookahead=0, disk=small, split=Split(copy, 1.0, demand=True)) as cache:
        expected = sample(rig.engine, prompt, COUNT)
        for n in (*range(8), *range(8, 400, 47)):
            cache.residency.forget()
            reads.count = 0
            reads.spoil = lambda k, n=n: OSError(errno.EIO, "gone") if k == n else None
            got, error = taken(rig.engine, prompt, COUNT)
            reads.spoil = lambda k: None
            assert got == expected[: len(got)]
            assert error is None or (isinstance(error, TransferError) and "gone; try again" in str(error))
            failed += error is not None
            cache.residency.forget()
            assert taken(rig.engine, prompt, COUNT) == (expected, None)
        assert cache.count().computed > 100 and failed > 8


# --- what was found


def test_a_read_that_fails_waits_for_those_beside_it(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert is read in parts at the same time. One that came late would overwrite the berth's next."""
    rig, under_way, late = rigs(4), [0], threading.Event()
    original = module.read_at
    monkeypatch.setattr(module, "PART", DIRECT)

    def read_at(file: OpenFile, memory: memoryview, offset: int) -> int:
        if threading.current_thread().name.endswith("_0"):
            late.wait(30)  # the other has begun
            raise OSError(errno.EIO, "gone")
        under_way[0] += 1
        late.set()
        time.sleep(0.05)
        count = original(file, memory, offset)
        under_way[0] -= 1
        return count

    with rig.cached(2, berths=7) as cache:
        files, memory = cache.store.files, torch.zeros(16 * DIRECT, dtype=torch.uint8)
        start = -memory.data_ptr() % DIRECT
        extent = files.extent(1, 3)
        shift = start + files.shift(1, 3)
        disk = cache.store.channels.reads.link
        monkeypatch.setattr(module, "read_at", read_at)
        with pytest.raises(TransferError, match="gone"):
            disk.move(extent, memory[shift : shift + extent.numel()], True)
        assert late.is_set() and under_way[0] == 0
        monkeypatch.setattr(module, "read_at", original)


class Gate(HostLink):
    """Moves nothing until a test opens it."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()

    def move(self, *args: Any) -> None:
        assert self.open.wait(60)
        super().move(*args)


def test_a_guess_comes_true_after_its_read_failed_and_before_the_link_knows(
    rigs: Any, reads: Reads, sample: Any
) -> None:
    rig, gate = rigs(4), Gate()
    with rig.cached(3, berths=7, prefetch=2, link=gate) as cache:
        residency, store = cache.residency, cache.store
        gate.open.clear()
        residency.bring_in(0, 0, "demand")  # keeps the link busy
        absent = next(e for e in range(rig.experts) if store.source(1, e) == "file")
        label = residency.label(1, absent, "guess")
        reads.spoil = lambda n: OSError(errno.EIO, "gone")
        store.claim(label)
        residency.send(label, residency.spares.take(1, absent).slot)
        fill = store.fills[store.berths.where[store.key(1, absent)]]
        until(lambda: fill.ticket.settled)
        slot, *_ = residency.bring_in(1, absent, "demand")
        gate.open.set()
        with pytest.raises(TransferError, match=r"^/.*\.safetensors: gone; try again$"):
            cache.copies.wait(residency.tickets[slot])
        reads.spoil, residency.complete = lambda n: None, False
        assert sample(rig.engine, rig.ids(3), COUNT) == rig.tokens(rig.ids(3), COUNT)


@pytest.mark.parametrize("channel", ["up", "back", "reads"])
def test_a_channel_whose_thread_dies_ends_the_others(
    rigs: Any, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise copies would wait for it for ever."""
    rig = rigs(4)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def dying(ticket: Ticket) -> None:
        raise MemoryError

    with rig.cached(2, berths=4) as cache:
        getattr(cache.store.channels, channel).finished = dying
        got, error = taken(rig.engine, rig.ids(3), 4 * COUNT)
        assert got == rig.tokens(rig.ids(3), 4 * COUNT)[: len(got)]
        assert isinstance(error, TransferError) and str(error) == "the engine is closed; load it again"
        until(lambda: all(engine.ended for engine in cache.store.channels.all))


def test_direct_reads_that_are_not_done_are_buffered(
    rigs: Any, reads: Reads, sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems take the flag, and then no such read."""
    rig = rigs(4)

    def refused(file: OpenFile, memory: memoryview, offset: int) -> int:
        if file.direct or always:
            raise OSError(errno.EINVAL, "Invalid argument")
        return reads(file, memory, offset)

    monkeypatch.setattr(module, "read_at", refused)
    with rig.cached(2, berths=6) as cache:
        files, always = list(cache.store.files.files.values()), False
        for file in files:
            file.direct = True
        assert sample(rig.engine, rig.ids(3), 4 * COUNT) == rig.tokens(rig.ids(3), 4 * COUNT)
        assert reads.count > 20 and not any(file.direct for file in files)
        always = True
        assert "Invalid argument; try again" in str(taken(rig.engine, rig.ids(3), 4 * COUNT)[1])


def tickets() -> set[Ticket]:
    return {found for found in gc.get_objects() if type(found) is Ticket}


def test_tickets_keep_no_others(rigs: Any, sample: Any) -> None:
    """Copies name those that they come after. Over many tokens their number does not grow."""
    rig, counts = rigs(4), list[int]()
    others = tickets()
    with rig.cached(**CASE) as cache:
        for _ in range(4):
            sample(rig.engine, rig.ids(3), 100)
            gc.collect()
            counts.append(len(tickets() - others))
        bound = len(cache.pool) + 3 * cache.store.berths.count
    assert 0 < max(counts) <= bound, (counts, bound)
