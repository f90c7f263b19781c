"""Rows from one GPU to another without the host, by NCCL. It has not been run: no two GPUs were at hand.

So an edge is tried out before it is relied upon, and the way over the host, which always works, is taken
wherever it does not work.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtime.ranks.beside import beside
from runtime.ranks.edge import FOREVER
from runtime.ranks.frames import Shape
from runtime.ranks.meeting import Meeting

TRIAL = Shape(3, 5, torch.float32)


def gpu_of(device: torch.device | None) -> dict[str, str] | None:
    """What a rank tells of its GPU: which one it is, and NCCL's version. None if it has none of either."""
    from torch.distributed import is_nccl_available

    if device is None or device.type != "cuda" or not is_nccl_available():
        return None
    try:
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        return {"gpu": gpu, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    except (RuntimeError, AttributeError):  # of a build of PyTorch's without one of them
        return None


def straight(sender: dict[str, str] | None, receiver: dict[str, str] | None) -> bool:
    """Whether rows can go from one rank's GPU to the other's. NCCL refuses two ranks on the same GPU.

    >>> straight({"gpu": "a", "nccl": "2.27"}, {"gpu": "b", "nccl": "2.27"})
    True
    >>> straight({"gpu": "a", "nccl": "2.27"}, {"gpu": "a", "nccl": "2.27"})
    False
    """
    if not sender or not receiver:
        return False
    return sender["gpu"] != receiver["gpu"] and sender["nccl"] == receiver["nccl"]


class GpuEdge:
    """One direction between two GPUs. The frame that announces the rows goes by an `Edge`."""

    def __init__(self, store: Any, sends: bool, device: torch.device) -> None:
        """The other end does the same with the same `store`."""
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = FOREVER  # the watch judges
        self.device, self.other = device, 1 if sends else 0
        with not_ending_the_process():
            self.group: Any = ProcessGroupNCCL(store, 1 - self.other, 2, options)
        self.stream = torch.cuda.Stream(device)
        self.under_way: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def send(self, rows: torch.Tensor) -> None:
        """Send rows of the current stream's. They are kept until they have been sent."""
        while self.under_way and self.under_way[0][0].query():
            self.under_way.popleft()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        rows = rows.contiguous()
        with torch.cuda.stream(self.stream):
            self.group.send([rows], self.other, 0).wait()  # the stream waits, not this thread
            done = torch.cuda.Event()
            done.record(self.stream)
        self.under_way.append((done, rows))

    def receive(self, shape: Shape) -> torch.Tensor:
        """Rows of this shape, which have come when this returns. Waits in C++ until they have, or until
        `abort` is called. Then they hold anything."""
        rows = torch.empty(shape.rows, shape.width, dtype=shape.dtype, device=self.device)
        with torch.cuda.device(self.device):
            self.group.recv([rows], self.other, 0).wait()
            torch.cuda.current_stream().synchronize()
        return rows

    def try_out(self) -> None:
        """Raises an error if rows do not arrive as they were sent."""
        expected = torch.arange(15, dtype=torch.float32, device=self.device).view(TRIAL.rows, TRIAL.width)
        if self.other == 1:
            self.send(expected)
        elif not torch.equal(self.receive(TRIAL), expected):
            raise RuntimeError("rows have changed on their way")
        torch.cuda.synchronize(self.device)

    def abort(self) -> None:
        """End all transfers, so that nothing here waits for a lost rank. Does not wait itself."""
        threading.Thread(target=self.group.abort, name="abort", daemon=True).start()


@contextmanager
def not_ending_the_process() -> Iterator[None]:
    """Inside, groups are made that leave it to the watch to judge an error of NCCL's. PyTorch would end the
    process."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


Edges = tuple[GpuEdge | None, GpuEdge | None]


def connect_gpus(meeting: Meeting, device: torch.device | None, patience: float) -> Edges:
    """From the previous rank and to the next one; None where that does not work within `patience` seconds.
    All ranks call this at the same time. Raises `Lost`."""
    gpus = meeting.share("gpu", gpu_of(device))
    made: dict[int, GpuEdge] = {}
    own = sorted(((meeting.rank - 1) % meeting.size, meeting.rank))
    for index in own:  # from rank `index` to the next one, in the order that all ranks keep
        if device is not None and straight(gpus[index], gpus[(index + 1) % meeting.size]):
            try:
                made[index] = attempt(meeting, index, device, time.monotonic() + patience)
            except (RuntimeError, OSError, AttributeError, TypeError):
                continue  # whatever NCCL and PyTorch's interface to it come up with: there is another way
    works = meeting.share("nccl", sorted(made))
    into, out = (
        made[index] if index in works[index] and index in works[(index + 1) % meeting.size] else None
        for index in ((meeting.rank - 1) % meeting.size, meeting.rank)
    )
    return into, out


def attempt(meeting: Meeting, index: int, device: torch.device, deadline: float) -> GpuEdge:
    """An edge that has been tried out. Raises what goes wrong, and `Lost`."""
    from torch.distributed import PrefixStore

    def look() -> None:
        meeting.watch.check()
        if time.monotonic() > deadline:
            raise OSError("NCCL does not answer")

    def make() -> GpuEdge:
        edge = GpuEdge(PrefixStore(f"gpu edge {index}", meeting.store), index == meeting.rank, device)
        edge.try_out()
        return edge

    return beside(make, look)
