"""Sends frames over an edge, some of which may be under way at the same time."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from runtime.ranks.edge import FRAMES, ROWS, Edge, wait
from runtime.ranks.frames import Frame

Tokens = queue.SimpleQueue[Any]  # what may be taken to send one more; None wakes whoever waits


class Woken(Exception):
    """There is no use in waiting any longer."""


# A message under way: what to wait for, and the message, which must live that long. Then the token goes back.
Send = tuple[Any, torch.Tensor, Tokens, Any]


class Outbox:
    """Frames are written by the caller's thread, which takes no longer than the system's call. A thread of
    the outbox's own learns when they are complete, some frames at a time."""

    def __init__(
        self, edge: Edge, frame_bytes: int, frames: int, large: int, broken: Callable[[], None]
    ) -> None:
        """Up to `frames` frames may be under way, and rows of their own of `large` of them. `broken` is
        called in the outbox's thread if the connection breaks."""
        self.edge, self.broken = edge, broken
        self.frames: Tokens = queue.SimpleQueue()
        self.permits: Tokens = queue.SimpleQueue()
        for _ in range(frames):
            self.frames.put(Frame(frame_bytes))
        for _ in range(large):
            self.permits.put(True)
        self.at_once = max(frames // 2, 1)
        self.begun: list[Send] = []
        self.batches: queue.SimpleQueue[list[Send] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, name="sends", daemon=True)
        self.thread.start()

    def send(self, header: Sequence[int], rows: torch.Tensor | None, apart: bool = False) -> None:
        """Send a frame (see `Frame.write`). Rows that do not fit it must stay as they are.

        Waits in Python while too many are under way. Raises `Woken` then, or if the connection is broken.
        """
        frame: Frame = taken(self.frames)
        try:
            message, complete = frame.write(header, rows, apart)
            messages, pools, tokens = [message], [self.frames], [frame]
            if not complete and rows is not None:
                messages.append(rows.to("cpu").contiguous().view(torch.uint8))
                pools.append(self.permits)
                tokens.append(taken(self.permits))
            sends = zip(self.edge.sends(messages, (FRAMES, ROWS)), messages, pools, tokens, strict=False)
        except BaseException:
            self.frames.put(frame)
            raise
        try:
            # C code alone, so no interrupt parts a frame from its rows, or either from what is known of it.
            self.begun.extend(sends)
        except RuntimeError as error:
            raise Woken from error
        if len(messages) > 1 or len(self.begun) >= self.at_once:
            self.hand_over()

    def hand_over(self) -> None:
        self.batches.put(self.begun)
        self.begun = []

    def wake(self) -> None:
        """End all waiting of `send`, now and later."""
        self.frames.put(None)
        self.permits.put(None)

    def finish(self) -> None:
        """Send no more. The thread ends when all is complete."""
        self.hand_over()
        self.batches.put(None)

    def close(self, seconds: float) -> None:
        """Give the connection back if the thread ends within `seconds`. Call `finish` and `Edge.sever`
        before."""
        self.thread.join(seconds)
        if not self.thread.is_alive():
            self.edge.close()

    def run(self) -> None:
        """What the thread does."""
        try:
            while (batch := self.batches.get()) is not None:
                while batch:  # so that no message lives longer than it must
                    work, message, pool, token = batch.pop(0)
                    wait(work)
                    pool.put(token)
                    del work, message, pool, token
        except RuntimeError:
            self.broken()


def taken(tokens: Tokens) -> Any:
    """The next token. Raises `Woken`."""
    if (token := tokens.get()) is None:
        tokens.put(None)
        raise Woken
    return token
