"""Experts that do not all fit the device: each layer computes from its slots, and what is missing comes from
the arena while what is there is being computed.

What comes out is bit for bit what a resident model gives: each expert's contribution is computed by the same
calls on the same bytes, and contributions are added in ascending order of expert, whatever order they came
in.

In a layer, with the router's choice at hand:

1. one transfer from the device tells the host the choice, and the lookahead gate's ranking for later layers;
2. experts that are in the layer's slots are pinned; the others get slots, and their copies begin, or, if they
   were guessed, are nearly done;
3. guesses for the next layers begin to travel, behind these;
4. experts are computed in that order, each waiting for its own bytes only, first for w1 and w3, then for w2;
5. contributions are added up.

A prompt may need more experts than there are slots. Then each that has been computed makes room for one that
is still missing, and each crosses the link once. Experts of the last tokens come last, so that decoding
finds them.
"""

import copy
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.kernels import step
from model.moe import Contributions, ManyTokens, OneToken, gated
from model.quant.expert import ExpertFormat
from model.router import Choice
from runtime.experts import trace
from runtime.experts.arena import Arena, unlocked_remedy
from runtime.experts.choices import added_up, by_last_use, to_host
from runtime.experts.copying import CopyEngine, HostLink, Link, Ticket
from runtime.experts.cuda_link import CudaLink
from runtime.experts.ledger import Ledger
from runtime.experts.policy import PolicyMaker, make_policy
from runtime.experts.slots import Guess, SlotTable, Spares
from runtime.planning.plan import Plan
from runtime.stats import Stats
from runtime.units import format_bytes


@dataclass
class Access:
    """An expert that a forward needs, and the slot that is pinned for it."""

    expert: int
    slot: int


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts, as a model wants them: `model.moe.Experts`."""

    cache: "ExpertCache"
    layer: int

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        return self.cache.apply(self.layer, x, choice)

    def step(self, x: Tensor, choice: Choice) -> Tensor:
        return self.cache.one(self.layer, x, choice)


class ExpertCache:
    """The slots of all layers on one device, and what it takes to fill them and to compute from them.

    Used by one thread at a time: the engine's lock sees to that.
    """

    def __init__(
        self,
        form: ExpertFormat,
        arena: Arena,
        copies: CopyEngine,
        device: torch.device,
        tables: Sequence[SlotTable],
        spares: Spares,
        prefetch: int = 1,
    ) -> None:
        """The slots of `tables`, one for each layer, and of `spares` are numbered from 0. For each of the
        layers that the router ranks the experts of, `prefetch` experts are guessed."""
        self.form, self.arena, self.copies, self.tables, self.spares = form, arena, copies, tables, spares
        self.untouched = copy.deepcopy((tables, spares))
        self.prefetch, self.first_bytes = prefetch, form.first_bytes
        total = sum(len(table.slots) for table in tables) + len(spares.free)
        self.pool = torch.empty(total, form.blob_bytes, dtype=torch.uint8, device=device)
        self.computed = [form.bind(blob) for blob in self.pool]
        # Where one token's experts are, for kernels that read experts by slot; the host's to be copied from.
        self.slots = torch.zeros(len(tables), arena.experts, dtype=torch.int64, device=device)
        self.host_slots = torch.zeros_like(self.slots, device="cpu", pin_memory=device.type == "cuda")
        self.slot_numbers = self.host_slots.numpy()  # the same memory
        self.tickets: dict[int, Ticket] = {}  # by slot: copies that computing has not come after yet
        self.last_use: list[Any] = [copies.link.used()] * total  # by slot: the link's mark behind it
        self.ledger = Ledger()
        self.counters = self.ledger.counters
        self.uncounted = Stats()  # what was before `start_over`
        self.complete = True  # the step before came to its end
        # A cache that is never closed would leave its thread, and the memory that it holds. Registered before
        # the thread starts: however making an engine fails, no thread is left.
        weakref.finalize(self, copies.end).atexit = False
        copies.start(arena, self.pool)

    @staticmethod
    def make(
        plan: Plan,
        form: ExpertFormat,
        device: torch.device,
        experts: int,
        policy: str | PolicyMaker = "lru",
        prefetch: int = 1,
        link_gbps: float | None = None,
    ) -> "ExpertCache":
        """With the slots that are planned; the arena is yet to be filled. Close it behind its last use."""
        on_gpu = device.type == "cuda"
        arena = Arena(len(plan.slots_per_layer), experts, form.blob_bytes, on_gpu, device if on_gpu else None)
        if on_gpu and not arena.pinned:
            warnings.warn(
                f"the driver locks {format_bytes(arena.locked_bytes)} of the {format_bytes(arena.bytes)} of "
                "host memory that hold experts: those in the rest are copied by way of small buffers, which "
                f"is slower; {unlocked_remedy()}",
                RuntimeWarning,
                stacklevel=6,  # where Engine.load was called
            )
        try:
            return ExpertCache.over(arena, plan, form, device, policy, prefetch, link_gbps)
        except BaseException:
            arena.close()
            raise

    @staticmethod
    def over(
        arena: Arena,
        plan: Plan,
        form: ExpertFormat,
        device: torch.device,
        policy: str | PolicyMaker = "lru",
        prefetch: int = 1,
        link_gbps: float | None = None,
    ) -> "ExpertCache":
        """The same over an arena that is there already, with a link of its own."""
        link: Link = HostLink(link_gbps * 1e9 if link_gbps else None)
        if device.type == "cuda":
            link = CudaLink(device, None if arena.pinned else arena.locked)
        numbers = iter(range(sum(plan.slots_per_layer) + plan.spares))
        tables = [
            SlotTable(islice(numbers, count), make_policy(policy, 0, layer))
            for layer, count in enumerate(plan.slots_per_layer)
        ]
        return ExpertCache(form, arena, CopyEngine(link), device, tables, Spares(numbers), prefetch)

    def close(self) -> None:
        """End the copy thread and let go of the memory, here and on the device."""
        if self.copies.close():  # else the arena goes when the last copy has ended
            self.arena.close()
        self.tickets.clear()
        self.computed.clear()
        self.__dict__.pop("pool", None)

    def count(self) -> Stats:
        """A copy of the counters."""
        return self.count_all() - self.uncounted

    def count_all(self) -> Stats:
        stalled = self.counters.stall_seconds + self.copies.link.stalled()
        return replace(
            self.counters,
            stall_seconds=stalled,
            copied_bytes=self.copies.moved,
            wasted_bytes=self.copies.wasted,
        )

    def start_over(self) -> None:
        """Begin with empty slots, and count from here: what has been computed was for no request."""
        self.forget()
        self.ledger.step = -1
        self.uncounted = self.count_all()

    def record(self, recorder: trace.Recorder | None) -> None:
        """Tell `recorder` all that happens from now on; None ends that."""
        self.ledger.recorder = recorder
        self.copies.finished = self.ledger.copied()

    def layer(self, number: int) -> LayerExperts:
        """That layer's experts, as a model wants them."""
        return LayerExperts(self, number)

    def apply(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        """What `model.moe.Experts` promises, of one layer. Raises `TransferError`.

        Whatever it may raise (Ctrl-C too, at any point), the next step begins with empty slots.
        """
        if layer == 0:
            self.begin_step()
        chosen, ahead = to_host(choice.ids, choice.ranking)
        (tokens, per_token), experts = chosen.shape, self.arena.experts
        needed = by_last_use(chosen, experts)
        self.ledger.choice(layer, tokens, needed, partial(added_up, chosen, choice.weights, needed), ahead)
        waiting, missing = self.admit(layer, needed)
        self.guess(layer, tokens, per_token, ahead)
        sums: Contributions
        if tokens == 1:
            sums = OneToken(x, choice, chosen[0].tolist())
        else:
            sums = ManyTokens(x, choice, np.bincount(chosen.ravel(), minlength=experts).tolist())
        while waiting:
            access = waiting.popleft()
            sums.add(access.expert, self.compute(layer, access, sums.inputs(access.expert)))
            self.release(layer, access)
            if missing:
                waiting.append(self.miss(layer, missing.popleft()))
        y = sums.total()
        self.complete = layer == len(self.tables) - 1
        return y

    def provide(
        self, layer: int, ids: list[int], weights: Tensor, ahead: list[list[int]]
    ) -> Callable[[], None]:
        """Bring a token's experts into this layer's slots: see `runtime.gpu.decoder.DecoderCache`. Call it
        after the device has done all that was launched before."""
        if layer == 0:
            self.begin_step()
        needed = sorted(ids)
        self.ledger.choice(layer, 1, needed, lambda: [weights.tolist()[ids.index(e)] for e in needed], ahead)
        accesses, missing = self.admit(layer, needed)
        assert not missing, (layer, ids, len(self.tables[layer].slots))
        self.guess(layer, 1, len(ids), ahead)
        for access in accesses:
            if (ticket := self.tickets.get(access.slot)) is not None:
                self.wait(layer, access, ticket, ticket.source.numel())
                self.arrived(layer, access)
        slots = {access.expert: access.slot for access in accesses}
        self.slot_numbers[layer, : len(ids)] = [slots[e] for e in ids]
        return partial(self.computed_one, layer, accesses)

    def one(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        """`Experts.step` of one layer: it reads from the host which slots `provide` found."""
        ids, weights = choice.ids[0], choice.weights[0]
        slots = self.slots[layer, : len(ids)]
        step.fetch(self.host_slots[layer, : len(ids)], slots)
        return self.form.step(x, self.pool, slots, weights, ids)

    def computed_one(self, layer: int, accesses: Iterable[Access]) -> None:
        """What `one` computes has been put on the device."""
        last = layer == len(self.tables) - 1
        # The device will have done that before the host decides for the next layer, so only behind the last
        # layer there is anything for a copy to wait for.
        mark = self.copies.link.used() if last else None
        for access in accesses:
            self.last_use[access.slot] = mark
            self.tables[layer].release(access.slot)
        self.complete = last

    def begin_step(self) -> None:
        if not self.complete:
            self.forget()
        self.complete = False
        self.ledger.begin_step()

    def forget(self) -> None:
        """Begin again with empty slots: a step was broken off, perhaps between two lines that belong
        together.

        Copies that are left stop behind the piece under way; new ones to the same slots come after that.
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

    def admit(self, layer: int, needed: Sequence[int]) -> tuple[deque[Access], deque[int]]:
        """Pin the needed experts that are in the layer's slots, and send for others while there is room.
        Returns these, in the order in which they can be computed, and what there was no room for."""
        table = self.tables[layer]
        missing = deque(e for e in needed if table.find(e) is None)
        waiting = deque(self.hit(layer, e) for e in needed if table.find(e) is not None)
        self.drop_guesses(layer, needed)
        while missing and table.has_room:
            waiting.append(self.miss(layer, missing.popleft()))
        return waiting, missing

    def hit(self, layer: int, expert: int) -> Access:
        self.ledger.hit(layer, expert)
        return Access(expert, self.tables[layer].hit(expert))

    def miss(self, layer: int, expert: int) -> Access:
        """Bring an expert to one of the layer's slots: from the arena, or from the spare that it was guessed
        to."""
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
            self.tickets[slot] = self.submit(layer, expert, slot, urgent=True)
        self.ledger.miss(layer, expert, evicted, guessed=guess is not None)
        return Access(expert, slot)

    def submit(self, layer: int, expert: int, slot: int, urgent: bool) -> Ticket:
        label = (self.ledger.step, layer, expert, "demand" if urgent else "guess")
        source, target = self.arena.blob(layer, expert), self.pool[slot]
        return self.copies.submit(source, target, urgent, self.last_use[slot], label)

    def guess(self, layer: int, tokens: int, per_token: int, ahead: list[list[int]]) -> None:
        """Send for experts that the next layers are likely to need, as long as there are spares.

        For one token, these are up to `prefetch` of the highest ranked, as many as it will choose; a prompt
        will need most experts, so all are worth having.
        """
        for distance, ranking in enumerate(ahead, start=1):
            there, room = self.tables[layer + distance], len(self.spares.free)
            likely = ranking[: max(per_token, self.prefetch)] if tokens == 1 else ranking
            absent = [
                (rank, e)
                for rank, e in enumerate(likely)
                if there.find(e) is None and self.spares.find(layer + distance, e) is None
            ]
            for rank, e in absent[: min(self.prefetch, room) if tokens == 1 else room]:
                guess = self.spares.take(layer + distance, e)
                assert guess is not None
                self.tickets[guess.slot] = self.submit(layer + distance, e, guess.slot, urgent=False)
                self.ledger.guess(layer + distance, e, distance, rank)

    def drop_guesses(self, layer: int, needed: Sequence[int]) -> None:
        """Forget guesses for this layer that have not come true."""
        for guess in list(self.spares.guesses.values()):
            if guess.layer == layer and guess.expert not in needed:
                self.drop(guess)

    def drop(self, guess: Guess) -> None:
        ticket = self.tickets.pop(guess.slot)
        self.copies.cancel(ticket)
        self.spares.drop(guess.slot)
        self.ledger.wasted(guess.layer, guess.expert, ticket.moved)

    def compute(self, layer: int, access: Access, x: Tensor) -> Tensor:  # [n, D] -> [n, D]
        expert, ticket = self.computed[access.slot], self.tickets.get(access.slot)
        if ticket is None:
            return expert(x)
        self.wait(layer, access, ticket, self.first_bytes)
        h = gated(x, expert.w13)  # [n, F], while w2 travels
        self.wait(layer, access, ticket, ticket.source.numel())
        self.arrived(layer, access)
        return expert.w2(h)

    def arrived(self, layer: int, access: Access) -> None:
        """Computing comes after all of the expert's copy."""
        del self.tickets[access.slot]
        self.tables[layer].ready(access.slot)

    def wait(self, layer: int, access: Access, ticket: Ticket, count: int) -> None:
        self.ledger.stall(layer, access.expert, self.copies.wait(ticket, count))

    def release(self, layer: int, access: Access) -> None:
        self.last_use[access.slot] = self.copies.link.used()
        self.tables[layer].release(access.slot)
