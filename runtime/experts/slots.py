"""Which expert is in which slot: bookkeeping in plain Python, without a device.

A slot is a buffer on the device with room for one expert's blob. It has a number of its own on that device.
Each layer owns a `SlotTable` with a fixed number of slots, though which ones they are may change. A few more
slots are `Spares`, which no layer owns: experts that are only guessed to be needed are copied there. When a
guess comes true, the layer adopts its slot and gives up its victim's slot in return, and no byte moves. So a
wrong guess evicts nothing. A layer's hits, misses and victims depend on its policy alone, not on guesses,
and not on how long copies take.

Nothing here waits, copies or locks. One thread calls this, and says when a copy is complete (`ready`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from runtime.experts.policy import Policy


class State(Enum):
    """What a slot holds: EMPTY, then LOADING, then READY. A victim's slot goes back to LOADING at once."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"


@dataclass
class Slot:
    state: State = State.EMPTY
    expert: int | None = None  # None exactly when EMPTY
    pins: int = 0  # accesses that have not been computed yet


class SlotTable:
    """One layer's slots.

    In each forward, `hit` the needed experts that are here, then `place` or `adopt` the others, compute, and
    `release` each. The first three pin the slot, and `release` unpins it. A pinned slot is not given away.
    Until all needed experts have been hit or placed, release only when `has_room` is False. Then the victims
    are the same however copies and computing overlap.

    >>> from runtime.experts.policy import LRU
    >>> table = SlotTable([10, 11, 12], LRU())
    >>> for expert in (5, 2):
    ...     slot, evicted = table.place(expert)
    ...     table.ready(slot)
    ...     table.release(slot)
    >>> print(table)
    slot  expert  state    pins
    10    5       ready    0
    11    2       ready    0
    12    -       empty    0

    A forward needs 5, 7 and 3. 5 is here. 7 takes the empty slot. For 3, the only candidate is 2.

    >>> table.find(7), table.find(5), table.hit(5)
    (None, 10, 10)
    >>> table.place(7), table.place(3)
    ((12, None), (11, 2))
    >>> print(table)
    slot  expert  state    pins
    10    5       ready    1
    11    3       loading  1
    12    7       loading  1
    """

    def __init__(self, slots: Iterable[int], policy: Policy) -> None:
        self.slots = {slot: Slot() for slot in slots}
        self.policy = policy
        self.where: dict[int, int] = {}  # expert -> the slot that holds or receives it

    def find(self, expert: int) -> int | None:
        """The slot that holds or receives the expert, if any. Changes nothing."""
        return self.where.get(expert)

    def __contains__(self, slot: int) -> bool:
        return slot in self.slots

    def hit(self, expert: int) -> int:
        """Pin an expert that is here, and return its slot, which may still be loading."""
        slot = self.where[expert]
        self.slots[slot].pins += 1
        self.policy.used(expert)
        return slot

    def place(self, expert: int) -> tuple[int, int | None]:
        """Give an expert that is not here a slot, pinned and loading. The caller begins its copy.

        Returns the slot, and the expert that was evicted for it, if any. If that one was still loading, the
        caller ends its copy. Raises `RuntimeError` if there is no room (see `has_room`).
        """
        slot, evicted = self.vacate(expert)
        self.fill(slot, expert)
        return slot, evicted

    def adopt(self, expert: int, slot: int) -> tuple[int, int | None]:
        """A guess came true: take over the spare `slot` that holds or receives the expert.

        The slot is the layer's from now on, pinned, and loading until computing has waited for its copy.
        Returns the slot that the layer gives up for it, whose bytes are worthless, and the expert that was
        evicted, if any. That is the expert that `place` would evict. Raises `RuntimeError` if there is no
        room.
        """
        assert slot not in self.slots, slot
        given, evicted = self.vacate(expert)
        del self.slots[given]
        self.fill(slot, expert)
        return given, evicted

    def exchange(self, slot: int, other: int) -> None:
        """Give up a slot that has just been given to an expert, and have its copy go to `other` instead."""
        assert other not in self.slots, other
        taken = self.slots[other] = self.slots.pop(slot)
        assert taken.expert is not None
        self.where[taken.expert] = other

    @property
    def has_room(self) -> bool:
        """Whether `place` and `adopt` will find a slot. If not, the forward needs more experts than there are
        slots: compute the expert that it accessed first, release it, and go on."""
        return any(slot.pins == 0 for slot in self.slots.values())

    def ready(self, slot: int) -> None:
        """The copy to the slot is complete."""
        assert self.slots[slot].state is State.LOADING, (slot, self.slots[slot])
        self.slots[slot].state = State.READY

    def release(self, slot: int) -> None:
        """Unpin a slot once: an access to it has been computed."""
        assert self.slots[slot].pins > 0, (slot, self.slots[slot])
        self.slots[slot].pins -= 1

    def vacate(self, expert: int) -> tuple[int, int | None]:
        """A slot for the expert: an empty one if there is one, else that of the policy's victim, which
        leaves."""
        assert expert not in self.where, (expert, self.where)
        candidates = set()
        for number, slot in self.slots.items():
            if slot.pins == 0 and slot.state is State.EMPTY:
                return number, None
            if slot.pins == 0 and slot.expert is not None:
                candidates.add(slot.expert)
        if not candidates:
            raise RuntimeError(f"no room for expert {expert}: all {len(self.slots)} slots are in use")
        victim = self.policy.victim(candidates)
        number = self.where[victim]
        self.clear(number, victim)
        return number, victim

    def clear(self, slot: int, expert: int) -> None:
        self.slots[slot].state, self.slots[slot].expert = State.EMPTY, None
        del self.where[expert]
        self.policy.evicted(expert)

    def fill(self, slot: int, expert: int) -> None:
        self.slots[slot] = Slot(State.LOADING, expert, pins=1)
        self.where[expert] = slot
        self.policy.used(expert)

    def __str__(self) -> str:
        lines = ["slot  expert  state    pins"]
        for number, slot in sorted(self.slots.items()):
            expert = "-" if slot.expert is None else slot.expert
            lines.append(f"{number:<4}  {expert:<6}  {slot.state.value:<7}  {slot.pins}")
        return "\n".join(lines)


@dataclass
class Guess:
    """An expert in a spare slot, or on its way there, that a layer will probably need."""

    slot: int
    layer: int
    expert: int


class Spares:
    """Slots that no layer owns, for guessed experts and for experts on their way back to host memory.

    >>> spares = Spares([20, 21])
    >>> first = spares.take(layer=1, expert=6)
    >>> first.slot, spares.find(1, 6) is first
    (20, True)

    Layer 1 does need expert 6. It adopts slot 20 and gives up slot 11, which then takes a later guess:

    >>> from runtime.experts.policy import LRU
    >>> table = SlotTable([11], LRU())
    >>> given, evicted = table.adopt(6, first.slot)
    >>> spares.exchange(20, given)
    >>> spares.take(layer=2, expert=0).slot, spares.take(layer=2, expert=3).slot
    (21, 11)
    """

    def __init__(self, slots: Iterable[int], guesses: int | None = None) -> None:
        """At most `guesses` of them hold guesses, by default all."""
        self.free = list(slots)  # the longest free first: its last use is most likely over
        self.most = len(self.free) if guesses is None else guesses
        self.guesses: dict[tuple[int, int], Guess] = {}  # by layer and expert, oldest first

    def find(self, layer: int, expert: int) -> Guess | None:
        """The guess that holds or receives the expert, if any. Changes nothing."""
        return self.guesses.get((layer, expert))

    def take(self, layer: int, expert: int) -> Guess | None:
        """A new guess in a free slot, or None if there is no room. The caller begins its copy."""
        assert (layer, expert) not in self.guesses, (layer, expert)
        if not self.room:
            return None
        guess = self.guesses[layer, expert] = Guess(self.free.pop(0), layer, expert)
        return guess

    def drop(self, slot: int) -> Guess:
        """Forget the guess in a slot, and return it. The slot is free again. The guess's copy must be
        complete, failed or cancelled."""
        guess = self.of(slot)
        del self.guesses[guess.layer, guess.expert]
        self.free.append(slot)
        return guess

    def exchange(self, slot: int, given: int) -> None:
        """A layer has adopted the guess in `slot` and gave up the slot `given` for it, which is free now."""
        assert given not in self, given
        guess = self.of(slot)
        del self.guesses[guess.layer, guess.expert]
        self.free.append(given)

    def swap(self, slot: int) -> int:
        """Keep a slot whose expert is on its way to host memory, and give the longest free one for it."""
        assert slot not in self, slot
        self.free.append(slot)
        return self.free.pop(0)

    @property
    def room(self) -> int:
        """How many more guesses there may be."""
        return self.most - len(self.guesses)

    def of(self, slot: int) -> Guess:
        return next(guess for guess in self.guesses.values() if guess.slot == slot)

    def __contains__(self, slot: int) -> bool:
        return slot in self.free or any(guess.slot == slot for guess in self.guesses.values())
