"""The CUDA link's side of the host: who waits for what, with stand-ins for streams and events."""

from typing import Any

import pytest
import torch

from runtime.experts.cuda_link import PIECE, CudaLink


class Cuda:
    """Notes the calls, in order."""

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
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **words: empty(*shape, **words))

    def take(self) -> list[str]:
        log, self.log[:] = list(self.log), []
        return log


def test_cuda_link_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    link = CudaLink(torch.device("cpu"), pinned=True)
    source, target = torch.arange(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    free = link.used()
    assert cuda.take() == ["e0 on compute"]
    link.begin(None)
    link.begin(free)
    assert cuda.take() == ["copies waits for e0"]
    marks = [link.move(source, target, True) for _ in (0, 1)]  # what is needed queues up at once
    assert cuda.take() == ["on copies", "e1 on copies", "on copies", "e2 on copies"]
    for _ in (0, 1, 2):  # of guesses, no third piece before the first has ended
        link.move(source, target, False)
    assert cuda.take() == [
        "on copies", "e3 on copies",
        "on copies", "e4 on copies", "host waits for e3",
        "on copies", "e5 on copies", "host waits for e4",
    ]  # fmt: skip
    link.reached(marks[1])
    assert cuda.take() == ["t6 on compute", "compute waits for e2", "t7 on compute"]
    assert torch.equal(source, target)
    link.reached(marks[1])
    assert link.stalled() == 0 and len(link.waits) == 2
    cuda.over |= {"t7"}
    assert link.stalled() == 7e-3 and len(link.waits) == 1
    cuda.over |= {"t9"}
    link.reached(marks[1])
    assert link.waited == 7e-3 + 9e-3 and len(link.waits) == 1
    cuda.take()
    link.close()
    assert cuda.take() == ["host waits for copies"]


def test_cuda_link_by_way_of_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    link = CudaLink(torch.device("cpu"), pinned=False)
    assert [len(buffer) for buffer in link.staging] == [PIECE, PIECE]
    used = []
    for n in range(5):
        target = torch.zeros(10, dtype=torch.uint8)
        link.move(torch.full((10,), n, dtype=torch.uint8), target, True)
        assert torch.all(target == n)
        used.append(link.staging[0].data_ptr())
        # a buffer is written to when the copy from it, two pieces before, has ended
        waits = [f"host waits for e{n - 2}"] if n >= 2 else []
        assert cuda.take() == ["on copies", *waits, f"e{n} on copies"]
    assert used[0] == used[2] == used[4] != used[1] == used[3]
