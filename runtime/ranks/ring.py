"""Frames to the next rank and from the previous one.

ring = Ring(meeting, frame_bytes(rows=8, width=4096, dtype=torch.bfloat16, header=16))
ring.send([7, 0], x)  # x [8, 4096]
header, rows = ring.receive()

Gloo's waits cannot be interrupted. So threads do the waiting there (`Inbox`, `Outbox`), and a rank's own
thread waits in Python, where Ctrl-C and a loss wake it.
"""

import atexit
import os
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from runtime.errors import RequestError
from runtime.ranks.beside import beside
from runtime.ranks.edge import Edge
from runtime.ranks.frames import Shape
from runtime.ranks.gpu_edge import connect_gpus
from runtime.ranks.inbox import Inbox
from runtime.ranks.lost import Lost
from runtime.ranks.meeting import Meeting
from runtime.ranks.outbox import Outbox, Woken

FRAMES = 8  # that may be under way in each direction, and around the ring without anyone's waiting to send
LARGE = 2  # of them with rows of their own
LEAST = 1 << 17  # bytes of a frame; to copy so few costs less than another message
PARTING = 1.0  # seconds for the next rank to close
JOIN = 0.3  # seconds for a thread to end


class Ring:
    """This rank's two neighbours. Use it in one thread; close it before the meeting.

    On the host it has 2 x `FRAMES` frames, and up to `LARGE` larger messages in each direction.
    """

    def __init__(
        self,
        meeting: Meeting,
        frame_bytes: int,
        patience: float = 60.0,
        least: int = LEAST,
        device: torch.device | None = None,
    ) -> None:
        """All ranks, at least 2, make one at the same time.

        Rows that fit a frame of `frame_bytes` together with the header (see `frames.frame_bytes`) are sent in
        one message. Larger ones take two. The ranks take the largest number that one of them says. Connecting
        takes up to `patience` seconds. Raises `Lost`.

        `device` is where this rank computes. Rows that are there go straight to the next rank's GPU, if that
        works.
        """
        self.meeting, self.watch = meeting, meeting.watch
        self.next = (meeting.rank + 1) % meeting.size
        self.previous = (meeting.rank - 1) % meeting.size
        self.process, self.closed = os.getpid(), False
        size = max(least, *meeting.share("frame bytes", frame_bytes))
        into, out = self.connect(patience)
        self.edges = [into, out]
        self.inbox = Inbox(into, size, FRAMES, LARGE, lambda: self.broke(self.previous))
        self.outbox = Outbox(out, size, FRAMES, LARGE, lambda: self.broke(self.next))
        self.gpu_into, self.gpu_out = connect_gpus(meeting, device, patience)
        for edge in (self.gpu_into, self.gpu_out):
            if edge is not None:
                self.watch.on_loss(edge.abort)
        self.watch.on_loss(self.wake)
        # A thread that came back from gloo while Python shuts down would end the process with a signal.
        atexit.register(self.abandon)

    def connect(self, patience: float) -> tuple[Edge, Edge]:
        """The edges from the previous rank and to the next one."""
        from torch.distributed import PrefixStore

        meeting = self.meeting

        def edge(index: int) -> Edge:
            """From rank `index` to the next one."""
            store = PrefixStore(f"edge {index}", meeting.store)
            return Edge(store, index == meeting.rank, meeting.address, patience)

        def both() -> dict[int, Edge]:
            """In the order that all ranks keep, so that none waits for another in a circle."""
            return {index: edge(index) for index in sorted((self.previous, meeting.rank))}

        try:
            edges = beside(both, self.watch.check)
        except RuntimeError as error:
            line = (
                f"rank {meeting.rank} cannot connect to its neighbours: {' '.join(str(error).split())[:200]}"
            )
            raise Lost(line) from error
        return edges[self.previous], edges[meeting.rank]

    def send(self, header: Sequence[int], rows: torch.Tensor | None = None) -> None:
        """Send whole numbers (int64) and rows [N, D], or none, to the next rank. Returns before they are
        there.

        Rows may be float32, bfloat16, float16 or int64, on any device. Rows on the host that do not fit a
        frame are sent from where they are: they must not change, until the rank after has answered or always.
        Raises `Lost`, and `ValueError` for what is no frame.
        """
        self.check()
        straight = rows is not None and self.gpu_out is not None and rows.device == self.gpu_out.device
        try:
            self.outbox.send(header, rows, straight)
        except Woken:
            self.explain(self.next)
        if straight and self.gpu_out is not None and rows is not None:
            self.gpu_out.send(rows)

    def receive(self) -> tuple[list[int], torch.Tensor | None]:
        """The next frame of the previous rank: its header, and its rows in the sender's dtype, which are the
        caller's to change. They are on the host, or on `device` if they came straight from another GPU.

        Waits for it. Raises `Lost`.
        """
        self.check()
        try:
            header, rows = self.inbox.receive()
        except Woken:
            self.explain(self.previous)
        if isinstance(rows, Shape):
            assert self.gpu_into is not None
            own = self.gpu_into.receive(rows)
            self.watch.check()  # a loss ends the transfer, and then there is anything in the rows
            return header, own
        return header, rows

    def check(self) -> None:
        """Raises `Lost` if a rank is lost, and `RequestError` if the ring is closed, or another process's."""
        self.watch.check()
        if self.closed:
            raise RequestError("the connection to the other ranks is closed")
        if self.process != os.getpid():
            raise RequestError(
                f"the ranks are connected to process {self.process}, not to its fork {os.getpid()}"
            )

    def explain(self, rank: int) -> NoReturn:
        """Raise `Lost` with the best reason why the connection to `rank` cannot be used."""
        self.watch.suspect(rank)
        while not self.watch.left(rank):
            self.watch.check()  # the watch finds a reason in some tenths of a second
            time.sleep(0.005)
        raise Lost(f"{self.meeting.name(rank)} has closed")

    def broke(self, rank: int) -> None:
        """A thread has found a broken connection."""
        if not self.closed:
            self.watch.suspect(rank)

    def wake(self) -> None:
        """End this rank's waiting."""
        self.inbox.wake()
        self.outbox.wake()

    def await_end(self, ended: Callable[[], bool], seconds: float) -> None:
        """Wait until `ended()`, but no longer than `seconds` or a loss."""
        deadline = time.monotonic() + seconds
        while not ended() and self.watch.cause is None and time.monotonic() < deadline:
            time.sleep(0.002)

    def close(self) -> None:
        """Send what is under way, and disconnect. Takes milliseconds if the neighbours close, too, and a
        second if one does not. After a loss, a thread that gloo does not let go may stay behind. Does nothing
        in a fork."""
        if self.closed or self.process != os.getpid():
            return
        self.closed = True
        atexit.unregister(self.abandon)
        self.outbox.finish()
        self.await_end(lambda: not self.outbox.thread.is_alive(), self.watch.timeout)
        self.watch.leave()
        self.await_end(lambda: self.watch.left(self.next), PARTING)
        self.sever()

    def abandon(self) -> None:
        """What happens if Python shuts down first."""
        if self.process == os.getpid():
            self.closed = True
            self.watch.end()
            self.sever()

    def sever(self) -> None:
        """Disconnect."""
        self.wake()
        for edge in self.edges:
            edge.sever()
        self.inbox.close(JOIN)
        self.outbox.close(JOIN)
