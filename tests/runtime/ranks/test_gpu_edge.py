"""Which way rows take, with edges that only look like those of GPUs. NCCL itself has not been run."""

import queue
from typing import Any

import pytest
import torch

from runtime.ranks import gpu_edge
from runtime.ranks.frames import Shape
from runtime.ranks.gpu_edge import gpu_of, straight
from runtime.ranks.meeting import Meeting
from runtime.ranks.ring import Ring
from tests.runtime.ranks.together import succeed

A, B = {"gpu": "a", "nccl": "2.27.5"}, {"gpu": "b", "nccl": "2.27.5"}


def test_rows_go_straight_between_two_gpus_with_the_same_nccl() -> None:
    assert straight(A, B) and straight(B, A)
    assert not straight(A, A)  # NCCL refuses that
    assert not straight(A, B | {"nccl": "2.26.2"})
    assert not straight(A, None) and not straight(None, B) and not straight(None, None)


def test_a_cpu_has_no_gpu() -> None:
    assert gpu_of(torch.device("cpu")) is None and gpu_of(None) is None


class FakeEdge:
    """Passes references on, among threads. Its device is the host."""

    def __init__(self, store: Any, sends: bool, device: torch.device) -> None:
        self.passing, self.device, self.sends = (
            wires.setdefault(str(store.get("wire")), queue.Queue()),
            device,
            sends,
        )
        self.sent = 0

    def try_out(self) -> None:
        if self.sends:
            self.passing.put(torch.ones(1))
        elif self.passing.get(timeout=5).shape != (1,):
            raise RuntimeError

    def send(self, rows: torch.Tensor) -> None:
        self.sent += 1
        self.passing.put(rows)

    def receive(self, shape: Shape) -> torch.Tensor:
        rows = self.passing.get(timeout=5)
        assert Shape(*rows.shape, rows.dtype) == shape
        return rows

    def abort(self) -> None:
        pass


wires: dict[str, Any] = {}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    wires.clear()
    monkeypatch.setattr(gpu_edge, "GpuEdge", FakeEdge)
    return monkeypatch


def exchange(meeting: Meeting) -> Any:
    """Small and large rows to the next rank. Returns how many went straight, and which edges there are."""
    for index in range(meeting.size):
        meeting.store.set(f"gpu edge {index}/wire", f"{index}")
    meeting.share("wires", None)
    ring = Ring(meeting, 256, least=0, device=torch.device("cpu"), patience=10)
    for n in (1, 2, 500):
        ring.send([n], torch.full((n, 4), float(meeting.rank)))
        ring.send([n])
        header, rows = ring.receive()
        assert header == [n] and rows is not None and rows.shape == (n, 4)
        assert bool((rows == (meeting.rank - 1) % meeting.size).all())
        assert ring.receive() == ([n], None)
    ring.close()
    out, into = ring.gpu_out, ring.gpu_into
    return getattr(out, "sent", 0), into is not None


def test_only_rows_between_gpus_go_straight(fakes: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 1 have one each, and rank 2 has none."""
    gpus = iter([A, B, None])  # by order of asking, which any rank may be first in

    def one(device: torch.device | None) -> dict[str, str] | None:
        return next(gpus)

    fakes.setattr(gpu_edge, "gpu_of", one)
    found = succeed(3, exchange)
    assert sorted(found) == [(0, False), (0, True), (3, False)]


@pytest.mark.parametrize("error", [RuntimeError("NCCL error"), AttributeError("no such call")])
def test_where_nccl_fails_rows_take_the_other_way(fakes: pytest.MonkeyPatch, error: Exception) -> None:
    """Also if it fails at one end only."""
    kinds = iter([A, B])
    fakes.setattr(gpu_edge, "gpu_of", lambda device: next(kinds))

    def fail(self: FakeEdge) -> None:
        if self.sends:
            raise error

    fakes.setattr(FakeEdge, "try_out", fail)
    assert succeed(2, exchange) == [(0, False), (0, False)]
