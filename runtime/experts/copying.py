"""Experts cross the link: a background thread that copies piece by piece, what is needed before what is
guessed.

The link is behind a protocol: a CUDA stream, or on a CPU a plain copy, as slow as asked for. So the whole
machinery of demand, guesses and overlap is the same on every machine, and can be studied on one without a
GPU.

A copy is done in pieces, each from whatever is most urgent by then. So a guess delays a needed expert by no
more than the piece under way, and computing can begin with the first matrices of an expert while its last
ones travel.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from runtime.errors import RequestError

CLOSED = "the engine is closed; load it again"


SLACK = 1e-3  # seconds that a busy link may catch up on, where sleeping took longer than asked for


class TransferError(RequestError):
    """An expert did not arrive. The request that needed it fails; the next one copies it anew."""


class Link(Protocol):
    """Moves bytes from host memory to the device. Called from the copy thread, but for `reached`,
    `used` and `stalled`."""

    piece: int  # bytes to move at a time

    def begin(self, free: Any) -> None:
        """What follows may overwrite a slot once computing has passed `free`, a mark made by `used`."""
        ...

    def move(self, source: Tensor, target: Tensor, urgent: bool) -> Any:
        """Copy one piece, or begin to. Returns a mark for `reached`. What is not urgent should not queue up
        ahead of what may become so."""
        ...

    def reached(self, mark: Any) -> None:
        """Computing, from here on, comes after the mark: called from the thread that computes."""
        ...

    def used(self) -> Any:
        """A mark behind all that has been computed so far: called from the thread that computes."""
        ...

    def stalled(self) -> float:
        """Seconds that the device's computing has waited for copies by itself, as far as that is over; not
        those that the thread which computes waited in `CopyEngine.wait`."""
        ...

    def close(self) -> None:
        """Return when nothing is on its way any more. No `move` follows."""
        ...


class HostLink:
    """A CPU's stand-in for a link: copies within host memory, at `bytes_per_second` or as fast as it can."""

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self.rate = bytes_per_second
        # About a millisecond's worth: sleeping any shorter is not accurate, and wakes this thread too often.
        self.piece = 1 << 20 if self.rate is None else min(max(int(self.rate / 1000), 1 << 14), 1 << 22)
        self.free_at = 0.0  # when the link has moved all that was put on it

    def begin(self, free: Any) -> None:
        pass

    def move(self, source: Tensor, target: Tensor, urgent: bool) -> None:
        start = time.perf_counter()
        np.copyto(target.numpy(), source.numpy())  # without the interpreter's lock, and in this thread alone
        if self.rate is not None:
            idle = start - self.free_at > SLACK
            self.free_at = (start if idle else self.free_at) + source.numel() / self.rate
            if (wait := self.free_at - time.perf_counter()) > 0:
                time.sleep(wait)

    def reached(self, mark: Any) -> None:
        pass

    def used(self) -> None:
        return None

    def stalled(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


@dataclass(eq=False)
class Ticket:
    """A copy of `source` to `target` [bytes] uint8, asked for and perhaps done."""

    source: Tensor
    target: Tensor
    urgent: bool
    free: Any = None  # the mark behind the target's last use
    label: Any = None  # the caller's own
    moved: int = 0  # bytes
    marks: list[tuple[int, Any]] = field(default_factory=list)  # (bytes moved by then, the link's mark)
    seconds: float = 0.0  # that the link took
    error: BaseException | None = None
    cancelled: bool = False

    @property
    def complete(self) -> bool:
        return self.moved == self.source.numel()


class CopyEngine:
    """The queue in front of a link, and the thread that serves it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.changed = threading.Condition()
        self.urgent: deque[Ticket] = deque()
        self.guesses: deque[Ticket] = deque()
        self.closed = False
        self.moved = self.wasted = 0  # bytes, in all, and for copies that were cancelled
        self.finished: Callable[[Ticket], None] | None = (
            None  # told of every complete copy, in the copy thread
        )
        self.thread = threading.Thread(target=self.serve, name="expert-copies", daemon=True)
        self.thread.start()

    def submit(
        self, source: Tensor, target: Tensor, urgent: bool, free: Any = None, label: Any = None
    ) -> Ticket:
        """Ask for a copy, which may overwrite the target behind the mark `free`. Needed ones are served in
        the order of asking, and before all guesses."""
        ticket = Ticket(source, target, urgent, free, label)
        with self.changed:
            if self.closed:
                raise TransferError(CLOSED)
            (self.urgent if urgent else self.guesses).append(ticket)
            self.changed.notify_all()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """A guess has come true: what is left of it is needed now."""
        with self.changed:
            ticket.urgent = True
            if ticket in self.guesses:
                self.guesses.remove(ticket)
                self.urgent.append(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Copy no more of it than the piece that is under way. Another copy to the same target, submitted
        afterwards, is served afterwards."""
        with self.changed:
            ticket.cancelled = True
            self.wasted += ticket.moved
            for queue in (self.urgent, self.guesses):
                if ticket in queue:
                    queue.remove(ticket)

    def wait(self, ticket: Ticket, count: int | None = None) -> float:
        """Let computing come after the first `count` bytes of a copy, or all. Returns the seconds that this
        thread waited for that. Raises `TransferError` if they do not arrive."""
        count = ticket.source.numel() if count is None else count
        waited = 0.0
        if ticket.moved < count:
            start = time.perf_counter()
            with self.changed:
                self.changed.wait_for(lambda: ticket.moved >= count or ticket.error or self.closed)
            waited = time.perf_counter() - start
        if ticket.moved < count:
            if ticket.error is None:
                raise TransferError(CLOSED)
            reason = describe(ticket.error)
            raise TransferError(f"an expert could not be copied to the device ({reason}); try again")
        self.link.reached(next(mark for moved, mark in ticket.marks if moved >= count))
        return waited

    def serve(self) -> None:
        """The thread. However it ends, nobody waits for it then."""
        try:
            self.move_pieces()
        finally:
            with self.changed:
                self.closed = True
                self.urgent.clear()
                self.guesses.clear()
                self.changed.notify_all()

    def move_pieces(self) -> None:
        """One piece of the most urgent copy, again and again."""
        while (ticket := self.next()) is not None:
            start = time.perf_counter()
            try:
                if ticket.moved == 0:
                    self.link.begin(ticket.free)
                rest = slice(ticket.moved, ticket.moved + self.link.piece)
                source = ticket.source[rest]
                mark = self.link.move(source, ticket.target[rest], ticket.urgent)
            except BaseException as error:  # whatever it is belongs to whoever waits for this copy
                self.finish(ticket, error)
                continue
            with self.changed:
                self.moved += source.numel()
                self.wasted += source.numel() * ticket.cancelled
                ticket.seconds += time.perf_counter() - start
                ticket.marks.append((ticket.moved + source.numel(), mark))
                ticket.moved += source.numel()  # last: who finds the bytes there asks for their mark
                self.changed.notify_all()
            if ticket.complete:
                self.finish(ticket)
                if (finished := self.finished) is not None:  # another thread may set it to None
                    finished(ticket)

    def next(self) -> Ticket | None:
        """What to move a piece of, when there is something; None once the engine is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.urgent or self.guesses)
            if self.closed:
                return None
            return (self.urgent or self.guesses)[0]

    def finish(self, ticket: Ticket, error: BaseException | None = None) -> None:
        with self.changed:
            ticket.error = error
            for queue in (self.urgent, self.guesses):
                if ticket in queue:
                    queue.remove(ticket)
            self.changed.notify_all()

    def close(self) -> None:
        """End the thread, when it has moved the piece under way. Whoever waits gets a `TransferError`."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if threading.current_thread() is not self.thread:  # which may happen to collect garbage
            self.thread.join()
        self.link.close()


def describe(error: BaseException) -> str:
    """In one line.

    >>> describe(OSError("no\\n  such bus")), describe(ValueError())
    ('no such bus', 'ValueError')
    """
    return " ".join(str(error).split()) or type(error).__name__
