"""Which expert is where: the slots of every layer, the copies on their way to them, and who leaves for whom.

Nothing here computes. `ExpertCache` asks for the experts that a layer needs, and computes each from its slot
as it arrives. Below, a layer needs experts 2 and 5. 2 is in a slot, a hit. 5 is not, a miss:

    host     route    send 5, guess
    device      router        expert 2              w13 of 5   w2 of 5       next layer: attention
    link                      w13 of 5   w2 of 5    guess for the next layer ...
                                     ^          ^
                                     computing 5 can begin     and end

A miss travels while hits are computed. Its w13 is computed with while its w2 travels. A guess travels after
the misses, while this layer's rest and the next layer's attention are computed. If the next layer then needs
that expert, its copy is nearly complete:

    device   ... layer 7 ... | attention of 8   router   hits     the guessed expert
    link     guess for 8 .............................. | the layer's other misses

With `lookahead` 2 there are guesses for both of the next layers, the nearer layer's first.

**What becomes of a guess.** It lands in a spare slot, which belongs to no layer. If its layer needs it, the
layer adopts the slot, and the victim's slot becomes the spare: no byte moves. If not, the copy is cancelled
and the slot is free again. So a wrong guess evicts nothing, and a layer's hits, misses and victims are its
policy's alone.

**A prompt** may need more experts than a layer has slots. Then each expert that was computed makes room for
one that is still missing, and each crosses the link once. The last tokens' experts come last, so that
decoding finds them in their slots.
"""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runtime.experts.arena import Arena
from runtime.experts.copying import CopyEngine, Ticket
from runtime.experts.ledger import Ledger
from runtime.experts.needs import Needs
from runtime.experts.slots import Guess, SlotTable, Spares


@dataclass  # not frozen: a frozen one takes five times as long to make, and every layer makes some
class Arrival:
    """An expert that a layer needs. Its slot is pinned until the arrival is released."""

    layer: int
    expert: int
    slot: int
    ticket: Ticket | None  # of the copy that computing has to wait for; None if the expert is there


class Residency:
    """The slots of all layers on one device. Used by one thread at a time: the engine sees to that."""

    def __init__(
        self,
        tables: Sequence[SlotTable],
        spares: Spares,
        arena: Arena,
        pool: Tensor,
        copies: CopyEngine,
        prefetch: int,
    ) -> None:
        """The slots of `tables`, one for each layer, and of `spares` are rows of `pool` [slots, blob bytes].
        For each layer that a router ranks ahead, up to `prefetch` experts are guessed."""
        self.tables, self.spares, self.prefetch = tables, spares, prefetch
        self.arena, self.pool, self.copies = arena, pool, copies
        self.untouched = copy.deepcopy((tables, spares))
        self.tickets: dict[int, Ticket] = {}  # by slot: copies that computing has not waited for yet
        self.last_use: list[Any] = [copies.link.used()] * len(pool)  # by slot: the link's mark after it
        self.ledger = Ledger()
        self.complete = True  # the forward before came to its end

    def arrivals(self, needs: Needs) -> Iterator[Arrival]:
        """The experts that a layer needs, in the order in which they can be computed.

        When the caller comes back for the next one, it has put the last one's computing on the device. That
        one's slot is released, and may receive an expert that there was no room for.
        """
        layer = needs.layer
        pinned, missing = self.admit(needs)
        waiting = deque(pinned)
        while waiting:
            arrival = waiting.popleft()
            yield arrival
            self.release(arrival, self.copies.link.used())
            if missing:
                waiting.append(self.miss(layer, missing.popleft()))
        self.complete = layer == len(self.tables) - 1

    def bring(self, needs: Needs) -> list[Arrival]:
        """A token's experts for one layer, pinned. What is put on the device from now on comes after their
        copies. Raises `TransferError`. Hand the result to `computed` after the layer has been launched."""
        arrivals, missing = self.admit(needs)
        assert not missing, needs
        for arrival in arrivals:
            self.wait(arrival)
        return arrivals

    def computed(self, arrivals: Sequence[Arrival]) -> None:
        """Release a layer that `bring` brought and the caller has put on the device."""
        self.complete = arrivals[0].layer == len(self.tables) - 1
        # The device will have computed an earlier layer before the host decides for the next one. So only
        # after the last layer is there anything for a copy to wait for.
        mark = self.copies.link.used() if self.complete else None
        for arrival in arrivals:
            self.release(arrival, mark)

    def wait(self, arrival: Arrival, count: int | None = None) -> None:
        """Let computing come after the first `count` bytes of an expert's copy, or after all of it. Raises
        `TransferError` if they do not arrive."""
        if arrival.ticket is None:
            return
        self.ledger.stall(arrival.layer, arrival.expert, self.copies.wait(arrival.ticket, count))
        if count is None:
            del self.tickets[arrival.slot]
            self.tables[arrival.layer].ready(arrival.slot)

    def begin_forward(self) -> None:
        """Forget everything if the forward before was broken off."""
        if not self.complete:
            self.forget()
        self.complete = False
        self.ledger.begin_forward()

    def forget(self) -> None:
        """Begin again with empty slots: a forward was broken off, perhaps between two lines that belong
        together.

        Copies that are under way stop after the current piece. New copies to the same slots come after that.
        """
        for guess in self.spares.guesses.values():
            if (ticket := self.tickets.get(guess.slot)) is not None:
                self.ledger.wasted(guess.layer, guess.expert, ticket.moved)
        for ticket in self.tickets.values():
            self.copies.cancel(ticket)
        self.copies.cancel_all()
        self.last_use = [self.copies.link.used()] * len(self.last_use)
        self.tables, self.spares = copy.deepcopy(self.untouched)
        self.tickets = {}

    def admit(self, needs: Needs) -> tuple[list[Arrival], deque[int]]:
        """Pin the needed experts that are in the layer's slots, send for the others while there is room, and
        then for guesses. Returns what is pinned, hits first, and the experts that there was no room for."""
        layer = needs.layer
        if layer == 0:
            self.begin_forward()
        self.ledger.routing(needs)
        table = self.tables[layer]
        missing = deque(e for e in needs.experts if table.find(e) is None)
        pinned = [self.hit(layer, e) for e in needs.experts if table.find(e) is not None]
        for guess in list(self.spares.guesses.values()):
            if guess.layer == layer and guess.expert not in needs.experts:
                self.drop(guess)
        while missing and table.has_room:
            pinned.append(self.miss(layer, missing.popleft()))
        self.guess(needs)
        return pinned, missing

    def hit(self, layer: int, expert: int) -> Arrival:
        self.ledger.hit(layer, expert)
        slot = self.tables[layer].hit(expert)
        return Arrival(layer, expert, slot, self.tickets.get(slot))

    def miss(self, layer: int, expert: int) -> Arrival:
        """Bring an expert to one of the layer's slots: from the arena, or from the spare that a guess copied
        it to."""
        table, guess = self.tables[layer], self.spares.find(layer, expert)
        if guess is not None and self.tickets[guess.slot].error is not None:
            self.drop(guess)
            guess = None
        if guess is not None:
            slot = guess.slot
            given, evicted = table.adopt(expert, slot)
            self.spares.exchange(slot, given)
            self.copies.promote(self.tickets[slot])
        else:
            slot, evicted = table.place(expert)
            self.submit(layer, expert, slot, demand=True)
        self.ledger.miss(layer, expert, evicted, guessed=guess is not None)
        return Arrival(layer, expert, slot, self.tickets[slot])

    def guess(self, needs: Needs) -> None:
        """Send for experts that the next layers will probably need, as long as there are spares.

        For one token these are up to `prefetch` of the highest ranked, as many as it will choose. A prompt
        will need most experts, so each is worth having.
        """
        one = needs.tokens == 1
        for distance, ranking in enumerate(needs.ahead, start=1):
            layer, room = needs.layer + distance, len(self.spares.free)
            likely = ranking[: max(needs.per_token, self.prefetch)] if one else ranking
            absent = [
                (rank, e)
                for rank, e in enumerate(likely)
                if self.tables[layer].find(e) is None and self.spares.find(layer, e) is None
            ]
            for rank, e in absent[: min(self.prefetch, room) if one else room]:
                guess = self.spares.take(layer, e)
                assert guess is not None
                self.submit(layer, e, guess.slot, demand=False)
                self.ledger.guess(layer, e, distance, rank)

    def submit(self, layer: int, expert: int, slot: int, demand: bool) -> None:
        label = (self.ledger.forward, layer, expert, "demand" if demand else "guess")
        source, target = self.arena.blob(layer, expert), self.pool[slot]
        self.tickets[slot] = self.copies.submit(source, target, demand, self.last_use[slot], label)

    def drop(self, guess: Guess) -> None:
        """Forget a guess that has not come true."""
        ticket = self.tickets.pop(guess.slot)
        self.copies.cancel(ticket)
        self.spares.drop(guess.slot)
        self.ledger.wasted(guess.layer, guess.expert, ticket.moved)

    def release(self, arrival: Arrival, mark: Any) -> None:
        """Unpin an expert's slot, which a copy may overwrite after `mark`."""
        self.last_use[arrival.slot] = mark
        self.tables[arrival.layer].release(arrival.slot)
