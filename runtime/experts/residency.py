"""Which expert is where: every layer's slots, the copies on their way to them, and who leaves for whom.

Nothing here computes. `ExpertCache` asks for the experts that a layer needs, and computes each one from its
slot as it arrives.

**One layer.** It needs experts 2 and 5. Expert 2 is in a slot, which is a hit. Expert 5 is not, a miss. It
travels while expert 2 is computed. Its w13 travels first, and is computed with while its w2 travels.

    compute   router | expert 2 |  (stall)  | w13 of 5 | (stall) | w2 of 5 | next layer: attention ...
    link             | w13 of 5             | w2 of 5            | guess for the next layer ...

**Two layers.** A guess travels after the misses, while the rest of this layer and the attention of the next
are computed. If the next layer does need the expert, most of it is there by then. With `lookahead` 2, layer 7
guesses for layer 8 and then for layer 9. A demanded copy overtakes guesses after the pieces under way.

    compute   router 7 | experts of 7       | attention 8 | router 8 | experts of 8 .......... | attention 9
    link               | misses of 7 | guess for 8 | guess for 9 ... | misses of 8 | guess for 9, the rest

**A token on a GPU** (`bring`) is simpler. The layer starts when its experts are all there, as one launch.

**What becomes of a guess.** It lands in a spare slot, which belongs to no layer. If its layer needs it, the
layer adopts the slot, and the victim's slot becomes the spare. No byte moves. If not, the copy is cancelled
and the slot is free again. So a wrong guess evicts nothing, and a layer's hits, misses and victims depend on
its policy alone.

**An expert that leaves** its slot is still in host memory, if it has a berth there. If not, it is sent back
first, while its slot counts among the spares: see `runtime.experts.store`.

**A prompt** may need more experts than a layer has slots. Then each expert that was computed makes room for
one that is still missing, and each crosses the link once. Hits come first. Among the misses, the last tokens'
experts come last, so that decoding finds them in their slots.
"""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runtime.experts.ledger import Ledger
from runtime.experts.needs import Needs
from runtime.experts.slots import Guess, SlotTable, Spares
from runtime.experts.split import Split
from runtime.experts.store import Label, Loan, Store
from runtime.experts.tickets import Ticket


@dataclass  # not frozen: a frozen one takes five times as long to make, and every layer makes some
class Arrival:
    """An expert that a layer needs. Its slot is pinned until the layer releases it."""

    layer: int
    expert: int
    slot: int
    ticket: Ticket | None  # the copy to wait for; None if the expert is there


class Residency:
    """The slots of all layers on one device, where experts are not all resident.

    The engine makes sure that only one thread at a time uses it.
    """

    def __init__(
        self,
        tables: Sequence[SlotTable],
        spares: Spares,
        store: Store,
        pool: Tensor,
        prefetch: int,
    ) -> None:
        """The slots of `tables`, one for each layer, and of `spares` are rows of `pool` [slots, blob bytes].
        For each layer that a router ranks ahead, up to `prefetch` experts are guessed."""
        self.tables, self.spares, self.prefetch = tables, spares, prefetch
        self.store, self.pool, self.copies = store, pool, store.channels.up
        self.split: Split | None = None  # says which of a token's missing experts the host computes
        self.untouched = copy.deepcopy((tables, spares))
        self.tickets: dict[int, Ticket] = {}  # by slot: copies that computing has not waited for yet
        self.last_use: list[Any] = [self.copies.link.used()] * len(pool)  # by slot: the link's mark after it
        self.ledger = Ledger()
        store.dropped = self.ledger.dropped
        self.complete = True  # the latest forward came to its end

    def arrivals(self, needs: Needs) -> Iterator[Arrival]:
        """The experts that a layer needs, in the order in which they can be computed: hits first, then
        misses, each in the order of `needs.experts`. Their copies are ordered at once.

        Take the next one only after the last one has been launched, or computed on a CPU. Then the last one's
        slot is released, and may receive an expert that there was no room for.
        """
        pinned, missing = self.admit(needs)
        return self.in_order(needs.layer, deque(pinned), missing)

    def in_order(self, layer: int, waiting: deque[Arrival], missing: deque[int]) -> Iterator[Arrival]:
        """`arrivals`, after copies have been ordered."""
        while waiting:
            arrival = waiting.popleft()
            yield arrival
            self.release(arrival, self.copies.link.used())
            if missing:
                waiting.append(self.miss(layer, missing.popleft()))
        self.complete = layer == len(self.tables) - 1

    def bring(self, needs: Needs) -> list[Arrival]:
        """A token's experts for one layer, pinned. Kernels launched from now on come after their copies.

        Hand the result to `release_layer` after the layer has been launched. Raises `TransferError` if an
        expert does not arrive.
        """
        arrivals, missing = self.admit(needs)
        assert not missing, needs
        for arrival in arrivals:
            self.wait(arrival)
        return arrivals

    def divide(self, needs: Needs) -> tuple[list[Arrival], list[Loan]]:
        """A token's experts for one layer: those that the device computes, pinned, and those that the host
        computes, as `split` says. Hand the former to `release_layer` after the layer has been launched, and
        end the loans of the latter."""
        layer, table, split = needs.layer, self.begin_layer(needs), self.split
        assert split is not None and needs.tokens == 1
        found = [e for e in needs.experts if table.find(e) is not None]
        brought, computed = split.divide(layer, found, [e for e in needs.experts if e not in found])
        arrivals = [self.hit(layer, e) for e in found] + [self.miss(layer, e) for e in brought]
        self.guess(needs)
        placed, loans = [], []
        for e in computed:
            if self.spares.find(layer, e) is not None or split.idle:
                placed.append(self.place(layer, e))
            else:
                self.store.claim(self.label(layer, e, "compute"))
                self.ledger.computed(layer, e)
            loans.append(self.store.lend(layer, e))
        for slot in placed:  # none of them was given the slot of another
            table.release(slot)
        split.pass_layer()
        return arrivals, loans

    def release_layer(self, layer: int, arrivals: Sequence[Arrival]) -> None:
        """Release the experts of `bring` or `divide`, after the caller has launched the layer."""
        last = layer == len(self.tables) - 1
        # The host reads the next layer's choice only after the device has computed this layer. So only after
        # the last layer does a copy have anything to wait for.
        mark = self.copies.link.used() if last else None
        for arrival in arrivals:
            self.release(arrival, mark)
        self.complete = last

    def wait(self, arrival: Arrival, count: int | None = None) -> None:
        """Let computing come after the first `count` bytes of an expert's copy, or after all of it. Raises
        `TransferError` if the bytes do not arrive."""
        if arrival.ticket is None:
            return
        self.ledger.stall(arrival.layer, arrival.expert, self.copies.wait(arrival.ticket, count))
        if count is None:
            del self.tickets[arrival.slot]
            self.tables[arrival.layer].ready(arrival.slot)

    def begin_forward(self) -> None:
        """Count a forward. Forget everything if the one before was broken off."""
        if not self.complete:
            self.forget()
        self.complete = False
        self.ledger.begin_forward()

    def forget(self) -> None:
        """Begin again with empty slots, after a forward was broken off, perhaps between two lines that belong
        together.

        Copies stop after the piece under way. New copies to the same slots come after that piece.
        """
        for guess in self.spares.guesses.values():
            if (ticket := self.tickets.get(guess.slot)) is not None:
                self.ledger.wasted(guess.layer, guess.expert, ticket.moved)
        for ticket in self.tickets.values():
            self.copies.cancel(ticket)
        self.store.forget()
        self.last_use = [self.copies.link.used()] * len(self.last_use)
        self.tables, self.spares = copy.deepcopy(self.untouched)
        self.tickets = {}
        if self.split is not None:
            self.split.clear()

    def admit(self, needs: Needs) -> tuple[list[Arrival], deque[int]]:
        """Pin the needed experts that are in slots. While there is room, send for the others, then guess.

        Returns the pinned experts, hits first, and the numbers of those that there was no room for.
        """
        layer, table = needs.layer, self.begin_layer(needs)
        if self.split is not None:
            self.split.clear()  # a prompt takes long enough for all that was under way
        missing = deque(e for e in needs.experts if table.find(e) is None)
        pinned = [self.hit(layer, e) for e in needs.experts if table.find(e) is not None]
        while missing and table.has_room:
            pinned.append(self.miss(layer, missing.popleft()))
        self.guess(needs)
        return pinned, missing

    def begin_layer(self, needs: Needs) -> SlotTable:
        """A layer's router has chosen. Drop wrong guesses for the layer, and return its slots."""
        if needs.layer == 0:
            self.begin_forward()
        self.ledger.routing(needs)
        for guess in list(self.spares.guesses.values()):
            if guess.layer == needs.layer and guess.expert not in needs.experts:
                self.drop(guess)
        return self.tables[needs.layer]

    def hit(self, layer: int, expert: int) -> Arrival:
        self.ledger.hit(layer, expert)
        slot = self.tables[layer].hit(expert)
        ticket = self.tickets.get(slot)
        if ticket is not None and not ticket.demand:  # placed, and still under way
            self.copies.promote(ticket)
        return Arrival(layer, expert, slot, ticket)

    def miss(self, layer: int, expert: int) -> Arrival:
        """Bring an expert to one of the layer's slots: from where it is, or from the spare that a guess
        copied it to."""
        slot, evicted, source, guessed = self.bring_in(layer, expert, "demand")
        self.ledger.miss(layer, expert, evicted, source, guessed)
        return Arrival(layer, expert, slot, self.tickets[slot])

    def place(self, layer: int, expert: int) -> int:
        """Let an expert that the host computes travel to one of the layer's slots. Returns the pinned
        slot."""
        slot, evicted, _, guessed = self.bring_in(layer, expert, "placed")
        if self.split is not None and not guessed:
            self.split.send(layer, expert)
        self.ledger.computed(layer, expert, evicted, placed=True, guessed=guessed)
        return slot

    def bring_in(self, layer: int, expert: int, kind: str) -> tuple[int, int | None, str, bool]:
        """Send a missing expert to one of the layer's slots, or take over the spare that a guess sent it to.

        Returns the slot, pinned, the expert that was evicted, if any, where the missing one was, and whether
        it had been guessed.
        """
        table, guess = self.tables[layer], self.spares.find(layer, expert)
        if guess is not None and self.tickets[guess.slot].error is not None:
            self.drop(guess)
            guess = None
        if guess is not None:
            source, slot = "host", guess.slot
            self.store.adopt(layer, expert, self.tickets[slot], kind == "demand")
            given, evicted = table.adopt(expert, slot)
            self.spares.exchange(slot, self.leave(layer, evicted, given))
        else:
            label, source = self.label(layer, expert, kind), self.store.source(layer, expert)
            self.store.claim(label)
            given, evicted = table.place(expert)
            slot = self.leave(layer, evicted, given)
            if slot != given:
                table.exchange(given, slot)
            self.send(label, slot)
        return slot, evicted, source, guess is not None

    def guess(self, needs: Needs) -> None:
        """Send for experts that the next layers will probably need, as long as there are free spares.

        For one token, these are up to `prefetch` absent experts from the top of the ranking, which is as many
        as a token chooses, or `prefetch` if that is more. A prompt needs most experts, so for a prompt every
        absent expert is worth a guess.
        """
        one = needs.tokens == 1
        for distance, ranking in enumerate(needs.ahead, start=1):
            layer, room = needs.layer + distance, self.spares.room
            likely = ranking[: max(needs.per_token, self.prefetch)] if one else ranking
            absent = [
                (rank, e)
                for rank, e in enumerate(likely)
                if self.tables[layer].find(e) is None and self.spares.find(layer, e) is None
            ]
            for rank, e in absent[: min(self.prefetch, room) if one else room]:
                if not self.store.can_guess(layer, e):
                    continue
                if one and self.split is not None:
                    if not self.split.in_time(distance):
                        break
                    self.split.send(layer, e)
                label = self.label(layer, e, "guess")
                self.store.claim(label)
                guess = self.spares.take(layer, e)
                assert guess is not None
                self.send(label, guess.slot)
                self.ledger.guess(layer, e, distance, rank)

    def leave(self, layer: int, evicted: int | None, slot: int) -> int:
        """A layer gives up a slot. Returns the slot that may be overwritten for it: another one, if the
        evicted expert is not in host memory and has to be sent there."""
        if evicted is None:
            return slot
        label, under_way = self.label(layer, evicted, "demand"), self.tickets.pop(slot, None)
        if under_way and self.split is not None:  # placed, and not needed since
            self.split.drop(layer, evicted)
        if not self.store.evict(label, slot, self.pool[slot], self.last_use[slot], under_way):
            return slot
        return self.spares.swap(slot)

    def send(self, label: Label, slot: int) -> None:
        self.tickets[slot] = self.store.send(label, slot, self.pool[slot], self.last_use[slot])

    def label(self, layer: int, expert: int, kind: str) -> Label:
        return self.ledger.forward, layer, expert, kind

    def drop(self, guess: Guess) -> None:
        """Forget a guess that has not come true."""
        ticket = self.tickets.pop(guess.slot)
        self.store.drop(guess.layer, guess.expert, ticket)
        if self.split is not None:
            self.split.drop(guess.layer, guess.expert)
        self.spares.drop(guess.slot)
        self.ledger.wasted(guess.layer, guess.expert, ticket.moved)

    def release(self, arrival: Arrival, mark: Any) -> None:
        """Unpin an expert's slot, which a copy may overwrite after `mark`."""
        self.last_use[arrival.slot] = mark
        self.tables[arrival.layer].release(arrival.slot)
