"""The copy engine: what goes first, what a guess can delay, and where errors surface."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.errors import RequestError
from runtime.experts.copying import CopyEngine
from runtime.experts.link import HostLink
from runtime.experts.tickets import TransferError

SIZE, PIECE = 40, 10


class PacedLink(HostLink):
    """Moves a piece each time a test lets it. Keeps a log of the pieces' first bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.piece = PIECE
        self.may, self.asked = threading.Semaphore(0), threading.Semaphore(0)
        self.log: list[tuple[int, bool]] = []
        self.fails: Callable[[int], bool] = lambda name: False
        self.closed = False

    def move(self, source: Tensor, target: Tensor, demand: bool) -> int:  # type: ignore[override]
        name = int(source[0])
        self.log.append((name, demand))
        self.asked.release()
        assert self.may.acquire(timeout=30)
        if self.fails(name):
            raise OSError(f"no {name}\ntoday")
        super().move(source, target, demand)
        return len(self.log)

    def let(self, count: int) -> None:
        """Let `count` pieces pass. Return when the next one is under way."""
        for _ in range(count):
            self.may.release()
            assert self.asked.acquire(timeout=30)

    def close(self) -> None:
        self.closed = True


class Bench:
    """A copy engine in front of a paced link. A copy's name is the byte that it consists of."""

    def __init__(self) -> None:
        self.link = PacedLink()
        self.engine = CopyEngine(self.link)
        self.engine.start()
        self.targets: dict[int, Tensor] = {}

    def submit(self, name: int, demand: bool) -> Any:
        self.targets[name] = torch.zeros(SIZE, dtype=torch.uint8)
        return self.engine.submit(torch.full((SIZE,), name, dtype=torch.uint8), self.targets[name], demand)

    def under_way(self) -> None:
        """Wait until the link has been asked for a piece."""
        assert self.link.asked.acquire(timeout=30)

    def order(self) -> list[int]:
        return [name for name, _ in self.link.log]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    for _ in range(99):
        bench.link.may.release()
    bench.engine.close()
    assert not bench.engine.thread.is_alive() and bench.link.closed


def test_what_is_needed_goes_before_what_is_guessed(bench: Bench) -> None:
    bench.submit(1, demand=False)
    bench.under_way()
    guess, first, second = bench.submit(2, False), bench.submit(3, True), bench.submit(4, True)
    bench.link.may.release(16)
    for ticket in (first, second, guess):
        bench.engine.wait(ticket)
    assert bench.order()[:9] == [1, 3, 3, 3, 3, 4, 4, 4, 4]  # a guess delayed them by the piece under way
    assert bench.order()[9:12] == [1, 1, 1]
    assert all(torch.all(bench.targets[name] == name) for name in (1, 2, 3, 4))
    assert bench.engine.moved == 4 * SIZE and bench.engine.wasted == 0


def test_a_guess_that_comes_true_keeps_what_has_been_moved(bench: Bench) -> None:
    ticket = bench.submit(1, demand=False)
    bench.under_way()
    other = bench.submit(2, demand=False)
    bench.link.let(2)
    bench.engine.promote(other)
    bench.engine.promote(ticket)
    bench.engine.promote(ticket)  # again changes nothing
    bench.link.may.release(16)
    bench.engine.wait(ticket)
    # its third piece was under way; then those promoted, in that order
    assert bench.order() == [1, 1, 1, 2, 2, 2, 2, 1]
    assert [demand for _, demand in bench.link.log] == [False] * 3 + [True] * 5
    assert bench.engine.moved == 2 * SIZE
    bench.engine.promote(ticket)  # nor when it is complete
    assert not bench.engine.demands and not bench.engine.guesses


def test_a_cancelled_copy_moves_no_more_than_the_piece_under_way(bench: Bench) -> None:
    ticket = bench.submit(1, demand=False)
    bench.under_way()
    bench.link.let(1)
    bench.engine.cancel(ticket)
    target = bench.targets[1]
    after = bench.engine.submit(torch.full((SIZE,), 9, dtype=torch.uint8), target, demand=True)
    bench.link.may.release(16)
    bench.engine.wait(after)
    assert bench.order() == [1, 1, 9, 9, 9, 9] and torch.all(target == 9)
    assert bench.engine.moved == SIZE + 2 * PIECE
    assert bench.engine.wasted == ticket.moved == 2 * PIECE


def test_cancelling_what_is_complete_or_has_not_begun(bench: Bench) -> None:
    done = bench.submit(1, demand=False)
    bench.link.may.release(16)
    bench.engine.wait(done)
    bench.engine.cancel(done)
    assert bench.engine.wasted == bench.engine.moved == SIZE


def test_computing_can_begin_with_the_first_bytes(bench: Bench) -> None:
    ticket = bench.submit(1, demand=True)
    marks: list[Any] = []
    bench.link.reached = marks.append  # type: ignore[method-assign]
    bench.link.may.release(2)
    assert bench.engine.wait(ticket, PIECE + 1) >= 0
    assert ticket.moved == 2 * PIECE and marks == [2]  # the mark after the piece with that byte
    assert bench.engine.wait(ticket, 1) == 0.0 and marks == [2, 1]
    bench.link.may.release(2)
    bench.engine.wait(ticket)
    assert marks == [2, 1, 4] and ticket.complete and ticket.seconds > 0


def test_an_error_reaches_only_the_thread_that_waits_for_that_copy(bench: Bench) -> None:
    bench.link.fails = lambda name: name == 1
    bad, good = bench.submit(1, demand=True), bench.submit(2, demand=True)
    bench.link.may.release(16)
    with pytest.raises(TransferError) as caught:
        bench.engine.wait(bad)
    assert str(caught.value) == "an expert could not be copied to the device (no 1 today); try again"
    assert isinstance(caught.value, RequestError)
    bench.engine.wait(good)
    assert torch.all(bench.targets[2] == 2) and bench.order() == [1, 2, 2, 2, 2]
    with pytest.raises(TransferError):
        bench.engine.wait(bad)  # still
    bench.link.fails = lambda name: False
    bench.engine.wait(bench.submit(1, demand=True))
    assert torch.all(bench.targets[1] == 1)


def test_an_error_after_the_first_bytes_leaves_those_usable(bench: Bench) -> None:
    bench.link.fails = lambda name: len(bench.link.log) > 1
    ticket = bench.submit(1, demand=True)
    bench.link.may.release(16)
    bench.engine.wait(ticket, PIECE)
    with pytest.raises(TransferError):
        bench.engine.wait(ticket)
    bench.engine.wait(ticket, PIECE)


def test_closing_wakes_threads_that_wait(bench: Bench) -> None:
    ticket, raised = bench.submit(1, demand=True), list[str]()

    def wait() -> None:
        try:
            bench.engine.wait(ticket)
        except TransferError as error:
            raised.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    bench.under_way()
    bench.submit(2, demand=True)
    closer = threading.Thread(target=bench.engine.close)
    closer.start()
    waiter.join(30)
    assert raised == ["the engine is closed; load it again"]
    assert closer.is_alive()  # the piece under way has not ended
    bench.link.may.release()
    closer.join(30)
    assert bench.order() == [1] and not bench.engine.thread.is_alive()
    with pytest.raises(TransferError, match="closed"):
        bench.submit(3, demand=False)
    bench.engine.close()


def test_a_recorder_that_raises_ends_all_waits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def finished(ticket: Any) -> None:
        raise ValueError

    bench.engine.finished = finished
    bench.submit(1, demand=True)
    after = bench.submit(2, demand=True)
    bench.link.may.release(16)
    with pytest.raises(TransferError, match="closed"):
        bench.engine.wait(after)


def test_a_thread_that_sees_the_bytes_finds_their_mark(bench: Bench) -> None:
    """`wait` looks without the lock, so the mark has to be there first."""

    class Slow(list[Any]):
        def append(self, item: Any) -> None:
            time.sleep(0.05)
            super().append(item)

    ticket = bench.submit(1, demand=True)
    ticket.marks = Slow()
    bench.link.may.release(16)
    while ticket.moved < PIECE:
        pass
    assert ticket.marks


def test_a_slow_link_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    link = HostLink(1e6)
    assert link.piece == 1 << 14
    source = torch.arange(100_000).to(torch.uint8)
    target = torch.zeros_like(source)
    for start in range(0, len(source), link.piece):
        link.move(source[start : start + link.piece], target[start : start + link.piece], True)
    assert now[0] == pytest.approx(0.1) and torch.equal(source, target)
    now[0] = 5.0  # idle time is not saved up
    link.move(source[:10_000], target[:10_000], True)
    assert now[0] == pytest.approx(5.01)
    assert HostLink(1e12).piece == 1 << 22 and HostLink().piece == 1 << 20
