"""Experts cross the link piece by piece, demanded experts before guesses.

The copy engine moves one piece at a time, always of the most pressing copy. So a guess delays a demanded
expert by no more than the pieces under way: one on a CPU, two on a GPU. Computing can begin with the first
matrices of an expert while its last matrix travels.

**Two threads.** A copy thread serves the queue. Where putting a piece on the link waits for nothing, the
computing thread puts demanded experts there itself, and the copy thread has only the guesses: handing an
expert over would take longer than putting it on the link.

**Channels.** `runtime.experts.store` has up to three engines. A copy may have to come `after` copies of other
engines, or follow closely the one that fills its source, its `feeder`. An engine passes over copies that
cannot go on yet. No copy waits for one that was ordered later, so none waits forever.

**Interrupts.** An interrupt may stop the computing thread between any two of its instructions, and a
finalizer or a signal handler may run there. So the computing thread takes a single lock, `turn`, by a `with`
that is C code throughout. It gives its orders through a queue that is C code, and it waits in C. Neither an
interrupt nor a finalizer that calls `end` can leave the copy thread waiting.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runtime.experts.arena import current
from runtime.experts.link import Link
from runtime.experts.tickets import Source, Ticket, TransferError, failed

CLOSED = "the engine is closed; load it again"
PATIENCE = 0.05  # seconds at most that a wait for a copy goes on after the engine was closed
LIMIT = 10.0  # seconds at most that closing waits for the piece under way


class CopyEngine:
    """The queue in front of a link, and the thread that serves it. One thread at a time gives orders."""

    def __init__(self, link: Link, name: str = "expert-copies", device: torch.device | None = None) -> None:
        """`name` is that of its thread, whose calls of the driver go to the GPU `device`."""
        self.link, self.device = link, device
        self.orders: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()  # for the copy thread
        self.turn = threading.Lock()  # held to put a piece on the link and count it
        self.demands: deque[Ticket] = deque()  # only the copy thread touches these two
        self.guesses: deque[Ticket] = deque()
        self.waits: deque[tuple[Ticket, int, threading.Lock]] = deque()  # (copy, bytes, released when there)
        self.era = 0
        self.closed = False  # the copy thread has been told to end
        self.ended = False  # the copy thread has ended, and nothing is under way
        self.moved = 0  # bytes, in all
        self.wasted_whole = self.wasted_parts = 0  # bytes; only one thread writes each
        self.finished: Callable[[Ticket], None] | None = None  # called with every complete copy
        self.keep: tuple[Any, ...] = ()
        self.end_all: Callable[[], object] = nothing  # ends the engines that wait for this one's copies
        self.thread = threading.Thread(target=self.serve, name=name, daemon=True)

    @property
    def wasted(self) -> int:
        """Bytes that were moved for copies that were then cancelled."""
        return self.wasted_whole + self.wasted_parts

    def start(self, *keep: Any) -> None:
        """Start the copy thread. The caller makes sure that `end` is called in the end, come what may.

        `keep` holds the memory that is copied from and to. The engine keeps it until nothing is under way.
        """
        self.keep = keep
        self.thread.start()

    def submit(
        self, source: Source, target: Tensor, demand: bool, free: Any = None, label: Any = None,
        after: Iterable[Ticket | None] = (), feeder: Ticket | None = None,
    ) -> Ticket:  # fmt: skip
        """Order a copy, which may begin after the mark `free` and the copies in `after`, and of whose source
        `feeder` is still filling the rest.

        Demanded copies are served before all guesses, and in the order in which they were submitted if they
        wait for nothing. Raises `TransferError` if closed.
        """
        if self.closed:
            raise TransferError(CLOSED)
        waits = tuple(other for other in after if other is not None and (other.marks or not other.settled))
        ticket = Ticket(source, target, demand, free, label, era=self.era, after=waits, feeder=feeder)
        for other in (*waits, feeder):
            if other is not None and not other.settled:
                other.wakes.append(self.wake_up)
        if self.can_move_at_once(ticket):
            self.move_at_once(ticket)
        else:
            self.orders.put(partial(self.enqueue, ticket))
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Turn a guess into a demand: the rest of it is needed now."""
        ticket.demand = True
        if not ticket.complete and self.can_move_at_once(ticket):
            self.move_at_once(ticket)
        elif not ticket.complete:
            self.orders.put(partial(self.prefer, ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Stop a copy after the piece under way. A later copy to the same target is served later."""
        if ticket.complete:
            self.wasted_whole += ticket.moved
        else:
            ticket.cancelled = True
            self.orders.put(partial(self.drop, ticket))

    def cancel_all(self) -> None:
        """Stop every copy that is not complete, also one whose ticket an interrupt kept from the caller."""
        self.era += 1
        self.orders.put(self.drop_old)

    def settle(self) -> None:
        """Return when no copy from before the latest `cancel_all` is under way any more, or if closed."""
        idle = threading.Lock()
        idle.acquire()
        self.orders.put(partial(self.report_idle, idle))
        while not self.closed and not idle.acquire(timeout=PATIENCE):
            pass

    def wait(self, ticket: Ticket, count: int | None = None) -> float:
        """Let computing come after the first `count` bytes of a copy, or after all of it.

        Returns the seconds that this thread waited. Raises `TransferError` if the bytes do not arrive.
        """
        count = ticket.source.numel() if count is None else count
        waited = 0.0
        if ticket.moved < count and ticket.error is None:
            start = time.perf_counter()
            arrived = threading.Lock()
            arrived.acquire()
            self.waits.append((ticket, count, arrived))
            # Check once more: the copy thread may have moved the bytes before it could see this wait, and may
            # even have ended since.
            while ticket.moved < count and ticket.error is None and not self.closed:
                arrived.acquire(timeout=PATIENCE)
            waited = time.perf_counter() - start
        if ticket.moved < count:
            if ticket.error is None:
                raise TransferError(CLOSED)
            raise failed(ticket.error, "an expert could not be copied to the device") from ticket.error
        self.link.reached(ticket.mark(count))
        return waited

    def can_move_at_once(self, ticket: Ticket) -> bool:
        """Whether the computing thread can put the copy on the link, and need not wait for anything."""
        feeder = ticket.feeder
        fed = feeder is None or (feeder.settled and feeder.complete)
        return ticket.demand and fed and ticket.may_begin() and not self.link.blocks(ticket.source)

    def move_at_once(self, ticket: Ticket) -> None:
        """Put the rest of a demanded copy on a link that does not block. It holds `turn` throughout, so no
        piece of a guess comes in between."""
        before = ticket.moved
        try:
            # The loop is in a function of its own. In CPython 3.13.0 an interrupt at the backward jump of a
            # `while` skips the end of a `with` around it.
            with self.turn:
                before = self.move_rest(ticket)
        except Exception as error:
            ticket.error = error
        if ticket.complete or ticket.error is not None:
            ticket.finish()
        if before < ticket.moved and ticket.complete:
            self.tell(ticket)

    def move_rest(self, ticket: Ticket) -> int:
        """Move all remaining pieces. Returns the bytes moved before that. Call it with `turn` held."""
        before = ticket.moved
        while not ticket.complete and ticket.error is None and not self.closed:
            self.move_piece(ticket, ticket.source[ticket.moved : ticket.moved + self.link.piece])
        return before

    def move_piece(self, ticket: Ticket, piece: Source) -> None:
        """Move the next piece of a copy. Call it with `turn` held."""
        began, start, size = time.perf_counter(), ticket.moved, piece.numel()
        if start == 0:
            for mark in (ticket.free, *(other.marks[-1][1] for other in ticket.after if other.marks)):
                self.link.begin(mark)
        if ticket.feeder is not None:
            self.link.begin(ticket.feeder.mark(start + size))
        mark = self.link.move(piece, ticket.target[start : start + size], ticket.demand)
        self.moved += size
        ticket.seconds += time.perf_counter() - began
        ticket.marks.append((start + size, mark))
        ticket.moved = start + size  # last: a thread that sees the bytes looks up their mark

    def wake_up(self) -> None:
        """Have the copy thread look again at what it can go on with."""
        self.orders.put(nothing)

    def tell(self, ticket: Ticket) -> None:
        if (finished := self.finished) is not None:  # another thread may set it to None
            finished(ticket)

    def end(self) -> None:
        """Tell the copy thread to end after the piece under way. A thread that waits for a copy gets a
        `TransferError`. Takes no lock and does not wait, so a finalizer may call it in any thread."""
        self.closed = True
        self.wake_up()

    def close(self) -> bool:
        """Tell the copy thread to end, and wait for it. Returns whether nothing is under way any more.

        That is False if the piece under way takes longer than `LIMIT`, or if the garbage collector calls this
        in the copy thread itself.
        """
        self.end()
        if self.thread.ident is None:  # it never started
            self.ended = True
        elif not self.in_its_thread():
            self.thread.join(LIMIT)
        return self.ended

    def in_its_thread(self) -> bool:
        return self.thread.ident == threading.get_ident()

    # --- the copy thread runs what follows

    def serve(self) -> None:
        """Copy until told to end. Then give up what is left, and close the link."""
        try:
            with current(self.device):
                while not self.closed:
                    ticket = self.take_orders()
                    if ticket is not None and not self.closed:
                        self.advance(ticket)
        finally:
            self.closed = True
            self.end_all()
            while not self.orders.empty():
                self.orders.get()()
            for ticket in (*self.demands, *self.guesses):
                ticket.error = ticket.error or TransferError(CLOSED)
                self.discard(ticket)
            while self.waits:
                self.waits.popleft()[2].release()
            # With `turn` held, what the computing thread puts on the link comes before this, or finds the
            # engine closed.
            with self.turn, contextlib.suppress(Exception):  # the device may be lost
                self.link.close()
            self.keep = ()
            self.ended = True

    def take_orders(self) -> Ticket | None:
        """Carry out all orders, and return the copy to go on with. Wait for more orders as long as there is
        none. Returns None if closed."""
        while not self.closed:
            if self.orders.empty():
                for ticket in (*self.demands, *self.guesses):
                    if ticket.may_begin():
                        return ticket
            self.orders.get()()
        return None

    def advance(self, ticket: Ticket) -> None:
        """Move one piece of a copy, and wake the threads that waited for it."""
        start, moved = ticket.moved, False
        try:
            end = min(start + self.link.piece, ticket.fed())
            piece = self.link.prepare(ticket.source[start:end], ticket.demand)
            with self.turn:
                # The computing thread may have cancelled the copy, moved the rest of it, or failed to.
                gone = ticket.cancelled or ticket.settled or ticket.era < self.era
                if ticket.moved == start and not gone:
                    self.move_piece(ticket, piece)
                    moved = True
        except BaseException as error:  # `wait` raises it in the thread that needs this copy
            ticket.error = error
        if ticket.complete or ticket.cancelled or ticket.error is not None:
            self.discard(ticket)
        else:
            ticket.pass_on()
        self.wake()
        if moved and ticket.complete:
            self.tell(ticket)

    def enqueue(self, ticket: Ticket) -> None:
        (self.demands if ticket.demand else self.guesses).append(ticket)

    def prefer(self, ticket: Ticket) -> None:
        if ticket in self.guesses:
            self.guesses.remove(ticket)
            self.demands.append(ticket)

    def drop(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        self.wasted_parts += ticket.moved
        self.discard(ticket)
        self.wake()  # removes a wait that an interrupt left here

    def drop_old(self) -> None:
        for ticket in (*self.demands, *self.guesses):
            if ticket.era < self.era:
                self.drop(ticket)

    def discard(self, ticket: Ticket) -> None:
        for tickets in (self.demands, self.guesses):
            if ticket in tickets:
                tickets.remove(ticket)
        ticket.finish()

    def report_idle(self, idle: threading.Lock) -> None:
        """Carried out after the orders of `cancel_all`, between two pieces."""
        with contextlib.suppress(Exception):  # the device may be lost
            self.link.settle()
        idle.release()

    def wake(self) -> None:
        """Release the threads whose bytes are there by now, or will never come."""
        for _ in range(len(self.waits)):
            ticket, count, arrived = self.waits.popleft()
            if ticket.moved >= count or ticket.error is not None or ticket.cancelled:
                arrived.release()
            else:
                self.waits.append((ticket, count, arrived))


def nothing() -> None:
    """An order that only wakes the copy thread."""
