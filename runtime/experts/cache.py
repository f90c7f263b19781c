"""The experts of a model that do not all fit the device.

Each layer computes from the experts in its slots, while the missing ones come from host memory. `residency`
decides which expert is where, and has a drawing of it. Here is what computes.

The result is bit for bit that of a resident model. The same calls compute each expert's contribution from the
same bytes, and contributions are added in ascending order of expert, in whichever order experts arrived. If
the host computes some of a token's experts, its bits are its own, and the result is the sum of two sums.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.kernels import step
from model.moe import Contributions, ManyTokens, OneToken
from model.quant.expert import ExpertFormat
from model.router import Choice
from model.rows import apart
from runtime.experts import trace
from runtime.experts.exchange import Exchange
from runtime.experts.host import HostExperts
from runtime.experts.needs import Needs, added_up, by_last_use, to_host
from runtime.experts.residency import Arrival, Residency
from runtime.experts.slots import SlotTable, Spares
from runtime.experts.store import Store
from runtime.stats import Stats


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts as the model calls them: `model.moe.StepExperts`."""

    cache: "ExpertCache"
    layer: int

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        return self.cache.apply(self.layer, x, choice)

    def step(self, x: Tensor, choice: Choice) -> Tensor:
        return self.cache.apply_step(self.layer, x, choice)

    @property
    def rest(self) -> Callable[[Tensor], Tensor] | None:
        exchange = self.cache.exchange
        return None if exchange is None else partial(exchange.add, self.layer)


class ExpertCache:
    """Computes from the slots of one device, which `residency` fills.

    The engine makes sure that only one thread at a time uses it.
    """

    def __init__(
        self,
        form: ExpertFormat,
        store: Store,
        device: torch.device,
        tables: Sequence[SlotTable],
        spares: Spares,
        prefetch: int = 1,
    ) -> None:
        """The slots of `tables`, one for each layer, and of `spares` are numbered from 0, together. For each
        layer that a router ranks ahead, up to `prefetch` experts are guessed."""
        self.form, self.store, self.copies = form, store, store.channels.up
        self.first_bytes = form.first_bytes
        total = sum(len(table.slots) for table in tables) + len(spares.free)
        self.pool = torch.empty(total, form.blob_bytes, dtype=torch.uint8, device=device)
        self.bound = [form.bind(blob) for blob in self.pool]  # by slot: computes the expert that is there
        self.residency = Residency(tables, spares, store, self.pool, prefetch)
        self.ledger = self.residency.ledger
        # The slots of one token's experts, by layer. In `apply_step` the device reads them from the host.
        self.slot_ids = torch.zeros(len(tables), store.experts, dtype=torch.int64, device=device)
        self.host_slot_ids = torch.zeros_like(self.slot_ids, device="cpu", pin_memory=device.type == "cuda")
        self.host_slot_array = self.host_slot_ids.numpy()  # the same memory, for Python to write
        self.exchange: Exchange | None = None  # with the host, if it computes some of a token's experts
        self.uncounted = Stats()  # the counters at `start_over`
        # A cache that is never closed would leave its thread, and the memory that the thread holds. The
        # finaliser comes before the thread, so no thread is left however the load of an engine fails.
        weakref.finalize(self, store.channels.end).atexit = False
        for engine in store.channels.all:
            engine.start(store.arena, self.pool)

    def end(self) -> bool:
        """Tell all threads to end. Returns whether the calling thread is one of them. Never waits."""
        self.store.channels.end()
        if self.exchange is not None:
            self.exchange.host.end()
            if self.exchange.host.in_its_thread():
                return True
        return any(engine.in_its_thread() for engine in self.store.channels.all)

    def open_exchange(self, exchange: Exchange) -> None:
        """Let the host compute some of a token's experts, those that `residency.split` gives to it. The cache
        starts the host, and closes it in the end."""
        weakref.finalize(self, exchange.host.end).atexit = False
        self.exchange = exchange
        exchange.host.start()

    @property
    def divided(self) -> bool:
        """Whether the host may compute some of a token's experts."""
        return self.exchange is not None

    def give(self, x: Tensor) -> None:
        """Launch what brings x [1, D], which a layer's experts take, to the host."""
        assert self.exchange is not None
        self.exchange.give(x)

    def close(self) -> None:
        """End the threads and free the memory of the host and the device."""
        if self.exchange is not None:
            self.exchange.host.close()
        if all([engine.close() for engine in self.store.channels.all]):
            self.store.arena.close()  # otherwise the copy threads free it after their last pieces
        self.residency.tickets.clear()
        self.bound.clear()
        self.__dict__.pop("pool", None)
        self.residency.__dict__.pop("pool", None)

    def count(self) -> Stats:
        """The counters since the engine was loaded."""
        return self.count_all() - self.uncounted

    def count_all(self) -> Stats:
        """The counters, warm-up included."""
        counters, channels = self.ledger.counters, self.store.channels
        return replace(
            counters,
            stall_seconds=counters.stall_seconds + self.copies.link.stalled(),
            copied_bytes=self.copies.moved,
            wasted_bytes=self.copies.wasted,
            read_bytes=channels.reads.moved if channels.reads else 0,
            written_back_bytes=channels.back.moved if channels.back else 0,
        )

    def start_over(self) -> None:
        """Begin with empty slots and counters at 0, after a warm-up that served no request."""
        self.residency.forget()
        self.ledger.forward = -1
        self.uncounted = self.count_all()

    def record(self, recorder: trace.Recorder | None) -> None:
        """Tell `recorder` of everything from now on. None ends that."""
        self.ledger.recorder = recorder
        channels = self.store.channels
        channels.up.finished = self.ledger.copied()
        if channels.back and channels.reads:
            channels.back.finished, channels.reads.finished = self.ledger.written_back(), self.ledger.read()

    def layer(self, number: int) -> LayerExperts:
        """That layer's experts as the model calls them."""
        return LayerExperts(self, number)

    def apply(self, layer: int, x: Tensor, choice: Choice) -> Tensor:  # [N, D] -> [N, D]
        """`model.moe.Experts` for one layer. Raises `TransferError` if an expert does not arrive.

        After any error, be it Ctrl-C at any instruction, the next forward begins with empty slots.
        """
        chosen, ahead = to_host(choice.ids, choice.ranking)
        (tokens, per_token), experts = chosen.shape, self.store.experts
        needed = by_last_use(chosen, experts)
        shares = partial(added_up, chosen, choice.weights, needed)
        needs = Needs(layer, needed, tokens, per_token, ahead, shares)
        if tokens == 1 and self.exchange is not None:
            return self.apply_divided(self.exchange.host, needs, x, choice, chosen[0].tolist())
        arrivals = self.residency.arrivals(needs)
        sums: Contributions
        if tokens == 1:
            sums = OneToken(x, choice, chosen[0].tolist())
        else:
            sums = ManyTokens(x, choice, np.bincount(chosen.ravel(), minlength=experts).tolist())
        for arrival in arrivals:
            sums.add(arrival.expert, self.compute(arrival, sums.inputs(arrival.expert), choice.apart))
        return sums.total()

    def apply_divided(
        self, host: HostExperts, needs: Needs, x: Tensor, choice: Choice, ids: list[int]
    ) -> Tensor:  # [1, D] -> [1, D]
        """`apply` for one token whose missing experts the host may compute. Returns the sum of the device's
        contributions plus the sum of the host's."""
        arrivals, loans = self.residency.divide(needs)
        if loans:
            job = host.begin(loans, x.cpu(), ids, choice.weights.cpu())
        sums = OneToken(x, choice, ids)
        for arrival in self.residency.in_order(needs.layer, deque(arrivals), deque()):
            sums.add(arrival.expert, self.compute(arrival, x))
        if not loans:
            return sums.total()
        theirs = host.wait(job).to(x.device)
        return sums.total() + theirs if arrivals else theirs

    def compute(self, arrival: Arrival, x: Tensor, each: bool = False) -> Tensor:  # [n, D] -> [n, D]
        """One expert's output. Each of its two products waits only for its own bytes. With `each`, x has
        rows of n texts."""
        expert = self.bound[arrival.slot]
        if arrival.ticket is None:
            return apart(expert, x) if each else expert(x)
        if each and not expert.independent:
            self.residency.wait(arrival)
            return apart(expert, x)
        self.residency.wait(arrival, self.first_bytes)
        h = expert.gated(x)  # [n, F], while w2 travels
        self.residency.wait(arrival)
        return expert.output(h, x.dtype)

    def provide(
        self, layer: int, ids: list[int], weights: Tensor, ahead: list[list[int]]
    ) -> Sequence[Callable[[], object]]:
        """Bring a token's experts into this layer's slots (see `runtime.gpu.decoder.DecoderCache`). Call it
        after the router has run, and before `apply_step` runs on the device."""
        needed = sorted(ids)

        def shares() -> list[float]:
            return added_up(np.array([ids]), weights[None], needed)

        needs = Needs(layer, needed, 1, len(ids), ahead, shares)
        finish: tuple[Callable[[], object], ...] = ()
        if self.exchange is None:
            arrivals = self.residency.bring(needs)
        else:
            arrivals, loans = self.residency.divide(needs)
            finish = (self.exchange.compute(layer, loans, ids, weights[None]),)
            for arrival in arrivals:
                self.residency.wait(arrival)
        slots = {arrival.expert: arrival.slot for arrival in arrivals}
        self.host_slot_array[layer, : len(ids)] = [slots.get(e, -1) for e in ids]  # -1: the host computes it
        return *finish, partial(self.residency.release_layer, layer, arrivals)

    def apply_step(self, layer: int, x: Tensor, choice: Choice) -> Tensor:  # [1, D] -> [1, D]
        """`StepExperts.step` for one layer. The device reads from host memory which slots `provide` found."""
        ids, weights = choice.ids[0], choice.weights[0]
        slots = self.slot_ids[layer, : len(ids)]
        step.fetch(self.host_slot_ids[layer, : len(ids)], slots)
        return self.form.step(x, self.pool, slots, weights, ids, absent=self.divided)
