"""Experts cross the link piece by piece, what is needed before what is guessed.

The link is behind a protocol: a CUDA stream, or on a CPU a plain copy, as slow as asked for. So the whole
machinery of demand, guesses and overlap is the same on every machine, and can be studied on one without a
GPU.

A copy is done in pieces, each from whatever is most urgent by then. So a guess delays a needed expert by no
more than the piece under way, and computing can begin with the first matrices of an expert while its last
ones travel.

A background thread serves the queue. Where putting a piece on the link does not wait for anything, the thread
that computes does that itself for what is needed, and the background thread has the guesses alone: handing
over a needed expert would take longer than putting it on the link.

Two threads meet here, and the one that computes may be interrupted between any two of its instructions, or
may run a finaliser or a signal's handler there. So it takes no lock but `turn`, by a `with` that is C code
throughout; it gives orders by a queue that is C code as well; and it waits in C. Neither an interrupt nor a
finaliser that calls `end` can leave the other thread waiting.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from runtime.errors import RequestError

CLOSED = "the engine is closed; load it again"
SLACK = 1e-3  # seconds that a busy link may catch up on, where sleeping took longer than asked for
PATIENCE = 0.05  # seconds that a wait for a copy goes on after the engine was closed, at most
LIMIT = 10.0  # seconds that closing waits for the piece under way, at most


class TransferError(RequestError):
    """An expert did not arrive. The request that needed it fails; the next one copies it anew."""


class Link(Protocol):
    """Moves bytes from host memory to the device. Called from the copy thread, but for `reached`, `used` and
    `stalled`, and for `begin` and `move` of what does not block."""

    piece: int  # bytes to move at a time

    def blocks(self, source: Tensor) -> bool:
        """Whether moving these bytes keeps the thread that asks for it waiting."""
        ...

    def begin(self, free: Any) -> None:
        """What follows may overwrite a slot once computing has passed `free`, a mark made by `used`."""
        ...

    def prepare(self, source: Tensor, urgent: bool) -> Tensor:
        """Wait until a piece may be put on its way, and return what `move` is to read. What is not urgent
        should not queue up ahead of what may become so."""
        ...

    def move(self, source: Tensor, target: Tensor, urgent: bool) -> Any:
        """Copy one piece, or begin to. Returns a mark for `reached`."""
        ...

    def reached(self, mark: Any) -> None:
        """Computing, from here on, comes after the mark: called from the thread that computes."""
        ...

    def used(self) -> Any:
        """A mark behind all that has been computed so far: called from the thread that computes."""
        ...

    def stalled(self) -> float:
        """Seconds that the device's computing has waited for copies by itself, as far as that is over; not
        those that the thread which computes waited in `CopyEngine.wait`. Changes nothing: called from any
        thread at any moment."""
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

    def blocks(self, source: Tensor) -> bool:
        return True

    def begin(self, free: Any) -> None:
        pass

    def prepare(self, source: Tensor, urgent: bool) -> Tensor:
        return source

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
    era: int = 0  # of the copy engine, when this was asked for

    @property
    def complete(self) -> bool:
        return self.moved == self.source.numel()


class CopyEngine:
    """The queue in front of a link, and the thread that serves it. One thread at a time asks for copies."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.orders: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()  # for the copy thread
        self.turn = threading.Lock()  # to put a piece on the link, and to count it
        self.urgent: deque[Ticket] = deque()  # these two are the copy thread's alone
        self.guesses: deque[Ticket] = deque()
        self.waits: deque[tuple[Ticket, int, threading.Lock]] = deque()  # added to by who waits
        self.era = 0
        self.closed = self.ended = False  # told to end; has ended, and nothing is on its way
        self.moved = 0  # bytes, in all
        self.wasted_whole = self.wasted_parts = 0  # each has one thread that writes it
        self.finished: Callable[[Ticket], None] | None = None  # told of every complete copy
        self.keep: tuple[Any, ...] = ()
        self.thread = threading.Thread(target=self.serve, name="expert-copies", daemon=True)

    @property
    def wasted(self) -> int:
        """Bytes moved for copies that were cancelled."""
        return self.wasted_whole + self.wasted_parts

    def start(self, *keep: Any) -> None:
        """Start the thread. Whoever calls this sees to it that `end` is called, however it goes on.

        What is in `keep`, memory that is copied from and to, is kept until nothing is on its way any more.
        """
        self.keep = keep
        self.thread.start()

    def submit(
        self, source: Tensor, target: Tensor, urgent: bool, free: Any = None, label: Any = None
    ) -> Ticket:
        """Ask for a copy, which may overwrite the target behind the mark `free`. Needed ones are served in
        the order of asking, and before all guesses."""
        if self.closed:
            raise TransferError(CLOSED)
        ticket = Ticket(source, target, urgent, free, label, era=self.era)
        if urgent and not self.link.blocks(source):
            self.move_at_once(ticket)
        else:
            self.orders.put(partial(self.enqueue, ticket))
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """A guess has come true: what is left of it is needed now."""
        ticket.urgent = True
        if ticket.complete:
            return
        if not self.link.blocks(ticket.source):
            self.move_at_once(ticket)
        else:
            self.orders.put(partial(self.prefer, ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Copy no more of it than the piece that is under way. Another copy to the same target, submitted
        afterwards, is served afterwards."""
        if ticket.complete:
            self.wasted_whole += ticket.moved
        else:
            ticket.cancelled = True
            self.orders.put(partial(self.drop, ticket))

    def cancel_all(self) -> None:
        """The same for all copies that are not complete, those included that an interrupt kept from becoming
        known to whoever asked for them."""
        self.era += 1
        self.orders.put(self.drop_old)

    def wait(self, ticket: Ticket, count: int | None = None) -> float:
        """Let computing come after the first `count` bytes of a copy, or all. Returns the seconds that this
        thread waited for that. Raises `TransferError` if they do not arrive."""
        count = ticket.source.numel() if count is None else count
        waited = 0.0
        if ticket.moved < count and ticket.error is None:
            start = time.perf_counter()
            arrived = threading.Lock()
            arrived.acquire()
            self.waits.append((ticket, count, arrived))
            # Asked once more, because the copy thread may have moved it before it could find this wait; and
            # by then it may have ended.
            while ticket.moved < count and ticket.error is None and not self.closed:
                arrived.acquire(timeout=PATIENCE)
            waited = time.perf_counter() - start
        if ticket.moved < count:
            if ticket.error is None:
                raise TransferError(CLOSED)
            reason = describe(ticket.error)
            raise TransferError(f"an expert could not be copied to the device ({reason}); try again")
        self.link.reached(next(mark for moved, mark in ticket.marks if moved >= count))
        return waited

    def move_at_once(self, ticket: Ticket) -> None:
        """Put what is left of a needed copy on a link that does not block: in one turn, so that no piece of a
        guess comes in between."""
        before = ticket.moved
        try:
            # The loop is a call away: an interrupt that comes where CPython 3.13.0 jumps back in a `while`
            # skips the end of the `with` around it.
            with self.turn:
                before = self.move_rest(ticket)
        except Exception as error:
            ticket.error = error
        if before < ticket.moved and ticket.complete:
            self.tell(ticket)

    def move_rest(self, ticket: Ticket) -> int:
        """All pieces that are left. Returns how many bytes had been moved before. With the turn taken."""
        before = ticket.moved
        while not ticket.complete and ticket.error is None and not self.closed:
            self.move_piece(ticket, ticket.source[ticket.moved : ticket.moved + self.link.piece])
        return before

    def move_piece(self, ticket: Ticket, piece: Tensor) -> None:
        """The next piece of a copy. With the turn taken."""
        began, start, size = time.perf_counter(), ticket.moved, piece.numel()
        if start == 0:
            self.link.begin(ticket.free)
        mark = self.link.move(piece, ticket.target[start : start + size], ticket.urgent)
        self.moved += size
        ticket.seconds += time.perf_counter() - began
        ticket.marks.append((start + size, mark))
        ticket.moved = start + size  # last: who finds the bytes there asks for their mark

    def tell(self, ticket: Ticket) -> None:
        if (finished := self.finished) is not None:  # another thread may set it to None
            finished(ticket)

    def end(self) -> None:
        """Tell the thread to end when it has moved the piece under way. Whoever waits for a copy gets a
        `TransferError`. Takes no lock and does not wait: a finaliser may call this, in any thread."""
        self.closed = True
        self.orders.put(lambda: None)

    def close(self) -> bool:
        """The same, and wait for that. Returns whether nothing is on its way any more: not if the piece under
        way takes very long, or if this is the copy thread itself, which happens to collect garbage."""
        self.end()
        if self.thread.ident is None:  # it never started
            self.ended = True
        elif not self.in_its_thread():
            self.thread.join(LIMIT)
        return self.ended

    def in_its_thread(self) -> bool:
        return self.thread.ident == threading.get_ident()

    # --- what follows runs in the copy thread

    def serve(self) -> None:
        """The thread."""
        try:
            while not self.closed:
                self.take_orders()
                if not self.closed:
                    self.advance((self.urgent or self.guesses)[0])
        finally:
            self.closed = True
            while not self.orders.empty():
                self.orders.get()()
            while self.waits:
                self.waits.popleft()[2].release()
            self.urgent.clear()
            self.guesses.clear()
            # In turn: what the other thread puts on the link comes before, or finds this engine closed.
            with self.turn, contextlib.suppress(Exception):  # of a device that is lost
                self.link.close()
            self.keep = ()
            self.ended = True

    def take_orders(self) -> None:
        """Do what has been ordered meanwhile; as long as there is nothing to copy, wait for more."""
        while not self.closed and not (self.orders.empty() and (self.urgent or self.guesses)):
            self.orders.get()()

    def advance(self, ticket: Ticket) -> None:
        """One piece of a copy."""
        start, moved = ticket.moved, False
        try:
            piece = self.link.prepare(ticket.source[start : start + self.link.piece], ticket.urgent)
            with self.turn:
                # The other thread may have cancelled it, or moved all the rest.
                if ticket.moved == start and not ticket.cancelled and ticket.era == self.era:
                    self.move_piece(ticket, piece)
                    moved = True
        except BaseException as error:  # whatever it is belongs to whoever waits for this copy
            ticket.error = error
        if ticket.complete or ticket.cancelled or ticket.error is not None:
            self.discard(ticket)
        self.wake()
        if moved and ticket.complete:
            self.tell(ticket)

    def enqueue(self, ticket: Ticket) -> None:
        (self.urgent if ticket.urgent else self.guesses).append(ticket)

    def prefer(self, ticket: Ticket) -> None:
        if ticket in self.guesses:
            self.guesses.remove(ticket)
            self.urgent.append(ticket)

    def drop(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        self.wasted_parts += ticket.moved
        self.discard(ticket)
        self.wake()  # an interrupted wait is forgotten

    def drop_old(self) -> None:
        for ticket in (*self.urgent, *self.guesses):
            if ticket.era < self.era:
                self.drop(ticket)

    def discard(self, ticket: Ticket) -> None:
        for waiting in (self.urgent, self.guesses):
            if ticket in waiting:
                waiting.remove(ticket)

    def wake(self) -> None:
        """Release those who wait for what is there by now, or will never be."""
        for _ in range(len(self.waits)):
            ticket, count, arrived = self.waits.popleft()
            if ticket.moved >= count or ticket.error is not None or ticket.cancelled:
                arrived.release()
            else:
                self.waits.append((ticket, count, arrived))


def describe(error: BaseException) -> str:
    """In one line.

    >>> describe(OSError("no\\n  such bus")), describe(ValueError())
    ('no such bus', 'ValueError')
    """
    return " ".join(str(error).split()) or type(error).__name__
