"""The host's side of the CUDA link: which stream or thread waits for what. Streams and events are
stand-ins."""

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime.experts import cuda_link
from runtime.experts.copying import CopyEngine
from runtime.experts.cuda_link import PIECE, CudaLink, CudaReturn
from runtime.experts.files import ExpertFiles
from runtime.experts.host import HostExperts
from runtime.experts.making import make_channels
from runtime.experts.tickets import TransferError
from runtime.gpu import streams
from runtime.gpu.streams import Streams


class Cuda:
    """Keeps a log of the calls, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.events = 0
        self.over: set[str] = set()  # names of events that have come to pass
        cuda, log = self, self.log

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_event(self, event: Any) -> None:
                log.append(f"{self.name} waits for {event.name}")

            def synchronize(self) -> None:
                log.append(f"host waits for {self.name}")

            def __enter__(self) -> None:
                log.append(f"on {self.name}")

            def __exit__(self, *error: object) -> None: ...

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.name = f"{'t' if enable_timing else 'e'}{cuda.events}"
                cuda.events += 1

            def record(self, stream: Stream) -> None:
                log.append(f"{self.name} on {stream.name}")

            def synchronize(self) -> None:
                log.append(f"host waits for {self.name}")

            def query(self) -> bool:
                return self.name in cuda.over

            def elapsed_time(self, end: Any) -> float:  # milliseconds
                return int(end.name[1:]) * 1.0

        empty, compute = torch.empty, Stream("compute")
        own: Any = [Stream(name) for name in ("copies", "returns", "capturing")]
        monkeypatch.setattr(cuda_link, "streams", lambda device: Streams(*own))
        monkeypatch.setattr(cuda_link, "same", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **words: empty(*shape, **words))

    def take(self) -> list[str]:
        log, self.log[:] = list(self.log), []
        return log


CPU = torch.device("cpu")


def pieces(*names: str) -> list[str]:
    return [line for name in names for line in ("on copies", f"{name} on copies")]


def test_from_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    link = CudaLink(CPU)
    source, target = torch.arange(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    assert not link.blocks(source)
    free = link.used()
    assert cuda.take() == ["e0 on compute"]
    link.begin(None)
    link.begin(free)
    assert cuda.take() == ["copies waits for e0"]

    def move(demand: bool) -> Any:
        return link.move(link.prepare(source, demand), target, demand)

    marks = [move(True) for _ in (0, 1)]  # what is needed queues up at once
    assert cuda.take() == pieces("e1", "e2")
    for _ in (0, 1, 2, 3):  # of guesses, no third piece before the first has ended
        move(False)
    assert cuda.take() == [
        *pieces("e3", "e4"), "host waits for e3", *pieces("e5"), "host waits for e4", *pieces("e6"),
    ]  # fmt: skip
    link.reached(marks[1])
    assert cuda.take() == ["t7 on compute", "compute waits for e2", "t8 on compute"]
    assert torch.equal(source, target)
    link.reached(marks[1])
    assert link.stalled() == 0 and len(link.waits) == 2
    cuda.over |= {"t8"}
    assert link.stalled() == link.stalled() == 8e-3 and len(link.waits) == 2  # asking changes nothing
    link.reached(marks[1])
    assert link.waited == link.stalled() == 8e-3 and len(link.waits) == 2
    cuda.over |= {"t10", "t12", "t14"}
    assert link.stalled() == pytest.approx(8e-3 + 10e-3 + 12e-3)
    link.reached(marks[1])
    assert link.stalled() == pytest.approx(8e-3 + 10e-3 + 12e-3 + 14e-3) and len(link.waits) == 1
    cuda.take()
    link.close()
    assert cuda.take() == ["host waits for copies"]


def test_through_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    link = CudaLink(CPU, lambda source: False)
    assert [len(buffer) for buffer in link.staging] == [PIECE, PIECE]
    used = []
    for n in range(5):
        source, target = torch.full((10,), n, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
        assert link.blocks(source)
        link.move(link.prepare(source, True), target, True)
        assert torch.all(target == n)
        used.append(link.staging[0].data_ptr())
        # a buffer is written to when the copy from it, two pieces before, has ended
        waits = [f"host waits for e{n - 2}"] if n >= 2 else []
        assert cuda.take() == [*waits, *pieces(f"e{n}")]
    assert used[0] == used[2] == used[4] != used[1] == used[3]


def test_some_of_the_memory_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked memory does not go through the buffers, even between two pieces of memory that is not locked."""
    cuda = Cuda(monkeypatch)
    link = CudaLink(CPU, lambda source: int(source[0]) > 100)
    locked, other = torch.full((10,), 101, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    target = torch.zeros(10, dtype=torch.uint8)
    assert link.blocks(other) and not link.blocks(locked)
    for n in range(3):
        staged = link.prepare(other, True)
        link.move(locked, target, True)
        link.move(staged, target, True)
        waits = [f"host waits for e{2 * n - 3}"] if n == 2 else []
        assert cuda.take() == [*waits, *pieces(f"e{2 * n}", f"e{2 * n + 1}")]


@pytest.mark.parametrize("locked", [True, False])
def test_back_to_the_host(locked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy up from memory that is not page-locked reads it without marks, so what comes back has to be
    there."""
    cuda = Cuda(monkeypatch)
    link = CudaReturn(CPU, locked)
    source, target = torch.arange(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    assert link.blocks(source) is not locked
    link.begin(link.used())
    link.move(link.prepare(source, True), target, True)
    waits = [] if locked else ["host waits for e1"]
    assert torch.equal(source, target)
    assert cuda.take() == ["e0 on compute", "returns waits for e0", "on returns", "e1 on returns", *waits]


def test_no_thread_calls_the_driver_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with the first GPU as its current one. To wait for a mark there would make a
    context."""
    Cuda(monkeypatch)
    inside: dict[str, torch.device] = {}

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            inside[threading.current_thread().name] = self.device

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Current)
    second, files = torch.device("cuda", 1), ExpertFiles({}, 10, direct=False)
    arena: Any = SimpleNamespace(pinned=True)
    engines = make_channels(second, arena, files, link_gbps=1, disk_gbps=1).all
    assert cast(Any, engines[2].link).pace.rate is None, "a GPU's rates are for its plan alone"
    host = HostExperts(cast(Any, None), second)
    for engine in engines:
        engine.start()
        engine.settle()
    host.start()
    assert all(engine.close() for engine in engines)
    host.close()
    names = ("expert-copies", "expert-returns", "expert-reading", "expert-host")
    assert inside == dict.fromkeys(names, second)


def test_the_thread_that_computes_puts_what_it_needs_on_the_stream_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, movers = Cuda(monkeypatch), list[tuple[str, int, bool]]()
    link = CudaLink(CPU)
    link.piece = 4
    move = link.move

    def noted(source: torch.Tensor, target: torch.Tensor, demand: bool) -> Any:
        movers.append((threading.current_thread().name, int(source[0]), demand))
        return move(source, target, demand)

    monkeypatch.setattr(link, "move", noted)
    gate = threading.Event()
    prepare = link.prepare

    def held(source: torch.Tensor, demand: bool) -> torch.Tensor:
        assert demand or len(movers) < 2 or gate.wait(30)  # the first pieces of guesses travel
        return prepare(source, demand)

    monkeypatch.setattr(link, "prepare", held)
    copies = CopyEngine(link)
    copies.start()

    def blob(name: int) -> Any:
        return SimpleNamespace(
            source=torch.full((10,), name, dtype=torch.uint8), target=torch.zeros(10).byte()
        )

    here = threading.current_thread().name
    guess, other, needed = blob(1), blob(2), blob(3)
    first = copies.submit(guess.source, guess.target, demand=False)
    second = copies.submit(other.source, other.target, demand=False)
    while len(movers) < 2:
        pass
    ticket = copies.submit(needed.source, needed.target, demand=True, free=link.used())
    assert ticket.complete and [movers[n:] for n in (2,)] == [[(here, 3, True)] * 3]
    assert "copies waits for" in " ".join(cuda.take())
    assert copies.wait(ticket) == 0.0 and torch.equal(needed.source, needed.target)
    copies.promote(first)  # 8 bytes of it have gone
    assert first.complete and movers[5:] == [(here, 1, True)] and torch.equal(guess.source, guess.target)
    assert [moved for moved, _ in first.marks] == [4, 8, 10]
    assert copies.wait(first) == 0.0
    gate.set()
    copies.wait(second)
    assert [entry[0] for entry in movers[6:]] == ["expert-copies"] * 3
    assert torch.equal(other.source, other.target) and copies.moved == 30 and copies.wasted == 0
    assert first.error is None and first.moved == 10  # though the copy thread was about to move the rest
    assert copies.close()


def test_what_is_cancelled_does_not_overwrite_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy thread is about to move a piece of a guess when a needed expert gets its slot."""
    Cuda(monkeypatch)
    for unknown in (False, True):  # whether an interrupt kept the guess from becoming known
        link, about, gate = CudaLink(CPU), threading.Event(), threading.Event()

        def prepare(source: Any, demand: bool, about: Any = about, gate: Any = gate) -> Any:
            about.set()
            assert gate.wait(30)
            return source

        monkeypatch.setattr(link, "prepare", prepare)
        copies = CopyEngine(link)
        copies.start()
        slot = torch.zeros(10, dtype=torch.uint8)
        guess = copies.submit(torch.full_like(slot, 1), slot, demand=False)
        assert about.wait(30)
        copies.cancel_all() if unknown else copies.cancel(guess)
        needed = copies.submit(torch.full_like(slot, 2), slot, demand=True)
        gate.set()
        copies.wait(needed)
        assert copies.close() and torch.all(slot == 2)
        assert guess.moved == 0 and copies.moved == 10


def test_an_error_on_the_stream_reaches_the_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    link = CudaLink(CPU)
    monkeypatch.setattr(link, "move", lambda *args: (_ for _ in ()).throw(RuntimeError("CUDA error: gone")))
    copies = CopyEngine(link)
    copies.start()
    slot = torch.zeros(10, dtype=torch.uint8)
    ticket = copies.submit(torch.ones_like(slot), slot, demand=True)
    with pytest.raises(TransferError, match=r"could not be copied to the device \(CUDA error: gone\)"):
        copies.wait(ticket)
    assert copies.close()


def test_closed_in_the_middle_of_a_demanded_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler closes it: no piece is put on the stream after the copy thread has seen it empty."""
    cuda = Cuda(monkeypatch)
    link = CudaLink(CPU)
    link.piece = 4
    move = link.move
    copies = CopyEngine(link)

    def ending(*args: Any) -> Any:
        copies.end()
        copies.thread.join(0.05)
        return move(*args)

    monkeypatch.setattr(link, "move", ending)
    copies.start()
    slot = torch.zeros(10, dtype=torch.uint8)
    ticket = copies.submit(torch.ones_like(slot), slot, demand=True)
    assert ticket.moved == 4
    with pytest.raises(TransferError, match="the engine is closed; load it again"):
        copies.wait(ticket)
    copies.promote(ticket)
    assert ticket.moved == 4 and copies.close()
    assert cuda.take() == [*pieces("e0"), "host waits for copies"]


def test_all_engines_share_the_streams_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make(device: Any = None, **same: Any) -> Any:
        made.append(device or same)
        return SimpleNamespace(stream_id=7, device_index=1, device_type=1)

    monkeypatch.setattr(torch.cuda, "Stream", make)
    streams.streams.cache_clear()
    one, two = torch.device("cuda", 0), torch.device("cuda", 1)
    try:
        first = streams.streams(one)
        assert streams.streams(torch.device("cuda", 0)) is first and made == [one] * 3
        assert streams.streams(two) is not first and made == [one] * 3 + [two] * 3
        streams.same(first.copies)
        assert made[6:] == [{"stream_id": 7, "device_index": 1, "device_type": 1}]
    finally:
        streams.streams.cache_clear()
