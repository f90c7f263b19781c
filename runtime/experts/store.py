"""Where a slot's expert comes from, and where it goes when it leaves: berths in host memory, and files.

With a berth for every expert, there is one channel, from host memory to the device. With fewer there are
three, which work at the same time. Here layer 3 misses expert 1, which is in a berth, and expert 6, which is
only in its file. Experts 0 and 4 leave for them, and no berth has those.

    files to berths    | read 6, piece by piece |
    berths to slots    | 1 | 6, as its pieces come |
    slots to berths    | 0 | 4 |

An expert that leaves does so through spares. Its slot becomes a spare slot, and the layer takes the spare
that has been free for longest. The berth that it goes to is the oldest double's. So a miss never waits until
an expert has left, and the two directions of the link never wait for each other.

Memory is overwritten only after all copies that read it: each copy names the ones that it has to come after.
What is in a berth counts only if the copy that filled it has come to its end (`Fill`). So a forward may be
broken off between any two lines here.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runtime.experts.arena import Arena
from runtime.experts.berths import Berths
from runtime.experts.copying import CopyEngine
from runtime.experts.files import ExpertFiles
from runtime.experts.tickets import Ticket


@dataclass(frozen=True)
class Fill:
    """What a berth holds, or will hold when the copy is complete. None is a copy of long ago."""

    expert: int
    ticket: Ticket | None


@dataclass(frozen=True)
class Channels:
    """The copies to the device, and if not every expert has a berth, those back and those from the files."""

    up: CopyEngine
    back: CopyEngine | None = None
    reads: CopyEngine | None = None

    def __post_init__(self) -> None:
        for engine in self.all:
            engine.end_all = self.end

    @property
    def all(self) -> list[CopyEngine]:
        return [engine for engine in (self.up, self.back, self.reads) if engine is not None]

    def end(self) -> None:
        """Tell all copy threads to end. A finalizer may call this: see `CopyEngine.end`."""
        for engine in self.all:
            engine.end()


@dataclass(eq=False)
class Loan:
    """An expert in a berth that the host computes from there. The berth is not overwritten before `use` is
    settled."""

    expert: int
    memory: Tensor  # [size] uint8
    fill: Ticket | None  # the copy to wait for; None if the expert is there
    use: Ticket

    def end(self) -> None:
        """The host needs the bytes no longer. Any thread may say so."""
        self.use.finish()


# Of a copy: forward, layer, expert, and why the expert comes. A slot needs it ("demand") or probably will
# ("guess"), or the host computes it, and it goes on to a slot ("placed") or not ("compute").
Label = tuple[int, int, int, str]


class Store:
    """All experts of a model, wherever they are. The computing thread alone calls it."""

    def __init__(
        self,
        arena: Arena,
        berths: Berths,
        experts: int,
        size: int,
        channels: Channels,
        files: ExpertFiles | None = None,
    ) -> None:
        """An expert of each layer's `experts` has `size` bytes. Berths that are not complete need `files` and
        all channels."""
        assert berths.complete or (files and channels.back and channels.reads)
        self.arena, self.berths, self.channels, self.files = arena, berths, channels, files
        self.experts, self.size = experts, size
        self.empty = deepcopy(berths)  # to begin again with
        self.fills: list[Fill | None] = [None] * berths.count
        self.users: list[list[Ticket]] = [[] for _ in range(berths.count)]  # copies from and to a berth
        self.leaving: dict[int, Ticket] = {}  # by slot: the copy of what left it last
        self.guessed: set[int] = set()  # guesses that have to be read from their files
        self.dropped: Callable[[int, int], None] = lambda layer, expert: None  # told of a single's end

    def load(self, layers: int) -> dict[tuple[int, int], Tensor]:
        """Give berths to as many experts as there is room for, from all `layers` alike. The caller reads each
        into its memory, which is returned by layer and expert, before anything else is called."""
        berths, everything = self.berths, range(layers * self.experts)
        if berths.complete:
            where = {key: key for key in everything}
        else:
            alike = sorted(everything, key=lambda key: key % self.experts)  # expert 0 of all layers first
            where = dict(enumerate(alike[: berths.count - berths.spare]))
        berths.restore(where)
        for berth, key in where.items():
            self.fills[berth] = Fill(key, None)
        return {divmod(key, self.experts): self.memory(key) for key in where.values()}

    def key(self, layer: int, expert: int) -> int:
        return layer * self.experts + expert

    def memory(self, key: int) -> Tensor:  # [size] uint8
        """The bytes of an expert that is in a berth, or will be."""
        shift = self.files.shift(*divmod(key, self.experts)) if self.files else 0
        return self.arena.berth(self.berths.where[key])[shift : shift + self.size]

    def source(self, layer: int, expert: int) -> str:
        """Where a slot gets the expert from: "host" or "file"."""
        return "file" if self.find(self.key(layer, expert)) is None else "host"

    def can_guess(self, layer: int, expert: int) -> bool:
        """Whether there is a berth that a guess may take, if it needs one."""
        return self.berths.can_hold(self.key(layer, expert))

    def claim(self, label: Label) -> None:
        """Make sure that an expert is in a berth, or on its way there. One that goes on to a slot is a double
        from now on, a guess is held. Raises `TransferError` if closed."""
        _, layer, expert, kind = label
        key = self.key(layer, expert)
        if self.find(key) is None:
            assert self.files and self.channels.reads
            berth = self.take(key)
            ticket = self.channels.reads.submit(
                self.files.extent(layer, expert), self.memory(key), kind != "guess",
                label=label, after=self.users[berth],
            )  # fmt: skip
            self.fill(berth, key, ticket)
            if kind == "guess":
                self.guessed.add(key)
        if kind == "guess":
            self.berths.hold(key)
        elif kind == "compute":
            self.berths.touch(key)
        else:
            self.berths.lift(key)

    def send(self, label: Label, slot: int, target: Tensor, free: Any) -> Ticket:
        """Copy an expert that was claimed to a slot, whose memory is `target`, after the mark `free`."""
        _, layer, expert, kind = label
        key = self.key(layer, expert)
        berth = self.berths.where[key]
        fill = self.fills[berth]
        assert fill is not None and fill.expert == key, (fill, key)
        ticket = self.channels.up.submit(
            self.memory(key), target[: self.size], kind == "demand", free, label,
            after=(self.leaving.get(slot),), feeder=fill.ticket,
        )  # fmt: skip
        if not self.berths.complete:
            self.use(berth, ticket)
        return ticket

    def lend(self, layer: int, expert: int) -> Loan:
        """An expert that was claimed, for the host to compute it."""
        key = self.key(layer, expert)
        berth, memory = self.berths.where[key], self.memory(key)
        fill = self.fills[berth]
        assert fill is not None and fill.expert == key, (fill, key)
        loan = Loan(expert, memory, fill.ticket, Ticket(memory, memory, demand=True))
        if not self.berths.complete:
            self.use(berth, loan.use)
        return loan

    def adopt(self, layer: int, expert: int, ticket: Ticket, demand: bool = True) -> None:
        """A guess came true. The rest of its copy is needed now, or with `demand` False only its bytes in
        host memory."""
        key = self.key(layer, expert)
        fill = self.fills[self.berths.where[key]]
        self.guessed.discard(key)
        self.berths.lift(key)
        if fill and fill.ticket and self.channels.reads:
            self.channels.reads.promote(fill.ticket)
        if demand:
            self.channels.up.promote(ticket)

    def drop(self, layer: int, expert: int, ticket: Ticket) -> None:
        """A guess has not come true. If it was read from its file, it leaves its berth, however far it came:
        what is in berths must not depend on the time that reads take."""
        key = self.key(layer, expert)
        self.channels.up.cancel(ticket)
        if key not in self.guessed:
            self.berths.let_go(key)
            return
        self.guessed.remove(key)
        berth = self.berths.where[key]
        fill, self.fills[berth] = self.fills[berth], None
        if fill and fill.ticket and self.channels.reads:
            self.channels.reads.cancel(fill.ticket)
        self.berths.vacate(key)

    def evict(
        self, label: Label, slot: int, memory: Tensor, free: Any, under_way: Ticket | None = None
    ) -> bool:
        """An expert leaves the slot with this memory. Returns whether it has to be sent back to a berth,
        which begins after the mark `free`. If so, the slot must stay a spare for a while.

        `under_way` is its copy to the slot if nothing has waited for that. It is cancelled, unless the expert
        is to be sent back: then it has to arrive first.
        """
        _, layer, expert, _ = label
        key = self.key(layer, expert)
        if self.berths.sink(key):
            if under_way:
                self.channels.up.cancel(under_way)
            return False
        assert self.channels.back
        if under_way:
            self.channels.up.promote(under_way)
        berth = self.take(key)
        ticket = self.channels.back.submit(
            memory[: self.size],
            self.memory(key),
            True,
            free,
            label,
            after=self.users[berth],
            feeder=under_way,
        )
        self.fill(berth, key, ticket)
        self.leaving[slot] = ticket
        return True

    def forget(self) -> None:
        """Begin again with what is in berths, after a forward was broken off. All copies are cancelled."""
        for engine in self.channels.all:
            engine.cancel_all()
        if not self.berths.complete:
            for engine in self.channels.all:
                engine.settle()
        self.fills = [fill if fill and there(fill.ticket) else None for fill in self.fills]
        self.users = [[] for _ in self.users]
        self.leaving, self.guessed = {}, set()
        self.berths = deepcopy(self.empty)
        self.berths.restore({berth: fill.expert for berth, fill in enumerate(self.fills) if fill})

    def find(self, key: int) -> int | None:
        """The expert's berth, if it is in one. One that did not arrive there is not."""
        berth = self.berths.find(key)
        if berth is None:
            return None
        fill = self.fills[berth]
        if fill and fill.ticket and fill.ticket.error:
            self.fills[berth] = None
            self.berths.vacate(key)
            return None
        return berth

    def take(self, key: int) -> int:
        """A berth for an expert, whose bytes are to come."""
        berth, dropped = self.berths.take(key)
        self.fills[berth] = None
        if dropped is not None:
            self.dropped(*divmod(dropped, self.experts))
        return berth

    def fill(self, berth: int, key: int, ticket: Ticket) -> None:
        self.fills[berth] = Fill(key, ticket)
        self.use(berth, ticket)

    def use(self, berth: int, ticket: Ticket) -> None:
        """Note a copy from or to a berth: those that will overwrite it have to come after it."""
        users = self.users[berth]
        last = [user for user in users if user.settled and user.marks][-1:]
        self.users[berth] = [*last, *(user for user in users if not user.settled), ticket]


def there(ticket: Ticket | None) -> bool:
    """Whether a copy has come to its end."""
    return ticket is None or (ticket.complete and ticket.error is None)
