"""Receives frames from an edge, ahead of whoever wants them."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from runtime.ranks.edge import FRAMES, ROWS, Edge, wait
from runtime.ranks.frames import Frame, Shape
from runtime.ranks.outbox import Woken


class Inbox:
    """A thread waits for frames. It holds a few, and then the sender has to wait."""

    def __init__(
        self, edge: Edge, frame_bytes: int, frames: int, large: int, broken: Callable[[], None]
    ) -> None:
        """Up to `frames` frames wait here, and rows of their own of `large` of them. `broken` is called in
        the inbox's thread if the connection breaks."""
        self.edge, self.broken = edge, broken
        self.empty: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()  # frames to receive into
        self.permits: queue.SimpleQueue[bool] = queue.SimpleQueue()  # to receive rows of their own
        self.come: queue.SimpleQueue[tuple[Frame, torch.Tensor | None] | None] = queue.SimpleQueue()
        self.posted: deque[tuple[Frame, Any]] = deque()  # frames that are being received, in order
        for _ in range(frames):
            self.empty.put(Frame(frame_bytes))
        for _ in range(large):
            self.permits.put(True)
        self.thread = threading.Thread(target=self.run, name="receives", daemon=True)
        self.thread.start()

    def receive(self) -> tuple[list[int], torch.Tensor | Shape | None]:
        """The next frame's header, and its rows on the host, which are the caller's, or the shape of rows
        that come apart. Waits in Python.

        Raises `Woken` when there is no use in waiting.
        """
        if (item := self.come.get()) is None:
            self.come.put(None)
            raise Woken
        frame, own = item
        header, rows = frame.read()
        self.empty.put(frame)
        if own is not None:
            self.permits.put(True)
        return header, rows if own is None else own

    def wake(self) -> None:
        """End all waiting, now and later, but for what waits in gloo."""
        self.come.put(None)
        self.permits.put(False)
        self.empty.put(None)

    def close(self, seconds: float) -> None:
        """Give the connection back if the thread ends within `seconds`. Call `wake` and `Edge.sever`
        before."""
        self.thread.join(seconds)
        if not self.thread.is_alive():
            self.posted.clear()
            self.edge.close()

    def run(self) -> None:
        """What the thread does."""
        try:
            while self.post():
                frame, work = self.posted.popleft()
                wait(work)
                own = None
                if (shape := frame.announced()) is not None:
                    if not self.permits.get():
                        return
                    own = torch.empty(shape.rows, shape.width, dtype=shape.dtype, device="cpu")
                    wait(self.edge.post(own.view(torch.uint8), ROWS))
                self.come.put((frame, own))
                del frame, work, own
        except RuntimeError:
            self.broken()
        finally:
            self.come.put(None)

    def post(self) -> bool:
        """Post a receive for every empty frame, and wait for one if none is posted. False means the end."""
        while not (self.posted and self.empty.empty()):
            if (frame := self.empty.get()) is None:
                return False
            self.posted.append((frame, self.edge.post(frame.bytes, FRAMES)))
        return True
