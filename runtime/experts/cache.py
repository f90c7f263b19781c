"""Experts that do not all fit the device: each layer computes from its slots, and what is missing comes from
host memory meanwhile (`runtime.experts.residency` has a drawing).

The result is bit for bit that of a resident model. Each expert's contribution is computed by the same calls
on the same bytes, and contributions are added in ascending order of expert, whatever order they came in.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from model.kernels import step
from model.moe import Contributions, ManyTokens, OneToken, gated
from model.quant.expert import ExpertFormat
from model.router import Choice
from runtime.experts import trace
from runtime.experts.arena import Arena, unlocked_remedy
from runtime.experts.copying import CopyEngine
from runtime.experts.cuda_link import CudaLink
from runtime.experts.link import HostLink, Link
from runtime.experts.needs import Needs, added_up, by_last_use, to_host
from runtime.experts.policy import PolicyMaker, make_policy
from runtime.experts.residency import Arrival, Residency
from runtime.experts.slots import SlotTable, Spares
from runtime.planning.plan import Plan
from runtime.stats import Stats
from runtime.units import format_bytes


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts, as a model wants them: `model.moe.StepExperts`."""

    cache: "ExpertCache"
    layer: int

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        return self.cache.apply(self.layer, x, choice)

    def step(self, x: Tensor, choice: Choice) -> Tensor:
        return self.cache.apply_step(self.layer, x, choice)


class ExpertCache:
    """Computes from the slots of one device, which `residency` fills.

    Used by one thread at a time: the engine sees to that.
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
        self.form, self.arena, self.copies = form, arena, copies
        self.first_bytes = form.first_bytes
        total = sum(len(table.slots) for table in tables) + len(spares.free)
        self.pool = torch.empty(total, form.blob_bytes, dtype=torch.uint8, device=device)
        self.bound = [form.bind(blob) for blob in self.pool]  # by slot: computes whatever expert is there
        self.residency = Residency(tables, spares, arena, self.pool, copies, prefetch)
        self.ledger = self.residency.ledger
        # The slots of one token's experts. In `apply_step` the device copies the host's to its own.
        self.slot_ids = torch.zeros(len(tables), arena.experts, dtype=torch.int64, device=device)
        self.host_slot_ids = torch.zeros_like(self.slot_ids, device="cpu", pin_memory=device.type == "cuda")
        self.host_slot_array = self.host_slot_ids.numpy()  # the same memory, for Python to write
        self.uncounted = Stats()  # what was before `start_over`
        # A cache that is never closed would leave its thread, and the memory that the thread holds. This is
        # registered before the thread starts, so no thread is left however making an engine fails.
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
        """With the planned slots. The caller fills the arena, and closes the cache after its last use."""
        on_gpu = device.type == "cuda"
        arena = Arena(len(plan.slots_per_layer), experts, form.blob_bytes, on_gpu, device if on_gpu else None)
        if on_gpu and not arena.pinned:
            locked, total = format_bytes(arena.locked_bytes), format_bytes(arena.total_bytes)
            warnings.warn(
                f"the driver locks {locked} of the {total} of host memory that hold experts; the others "
                f"are copied through small buffers, which is slower; {unlocked_remedy()}",
                RuntimeWarning,
                stacklevel=4,  # where Engine.load was called
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
        """The same over an existing arena, with a link of its own."""
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
        self.residency.tickets.clear()
        self.bound.clear()
        self.__dict__.pop("pool", None)
        self.residency.__dict__.pop("pool", None)

    def count(self) -> Stats:
        """A copy of the counters."""
        return self.count_all() - self.uncounted

    def count_all(self) -> Stats:
        counters = self.ledger.counters
        return replace(
            counters,
            stall_seconds=counters.stall_seconds + self.copies.link.stalled(),
            copied_bytes=self.copies.moved,
            wasted_bytes=self.copies.wasted,
        )

    def start_over(self) -> None:
        """Begin with empty slots, and count from here: what has been computed was for no request."""
        self.residency.forget()
        self.ledger.forward = -1
        self.uncounted = self.count_all()

    def record(self, recorder: trace.Recorder | None) -> None:
        """Tell `recorder` all that happens from now on; None ends that."""
        self.ledger.recorder = recorder
        self.copies.finished = self.ledger.copied()

    def layer(self, number: int) -> LayerExperts:
        """That layer's experts, as a model wants them."""
        return LayerExperts(self, number)

    def apply(self, layer: int, x: Tensor, choice: Choice) -> Tensor:  # [N, D] -> [N, D]
        """What `model.moe.Experts` promises, of one layer. Raises `TransferError`.

        Whatever it raises, be it Ctrl-C at any point, the next forward begins with empty slots.
        """
        chosen, ahead = to_host(choice.ids, choice.ranking)
        (tokens, per_token), experts = chosen.shape, self.arena.experts
        needed = by_last_use(chosen, experts)
        shares = partial(added_up, chosen, choice.weights, needed)
        sums: Contributions
        if tokens == 1:
            sums = OneToken(x, choice, chosen[0].tolist())
        else:
            sums = ManyTokens(x, choice, np.bincount(chosen.ravel(), minlength=experts).tolist())
        for arrival in self.residency.arrivals(Needs(layer, needed, tokens, per_token, ahead, shares)):
            sums.add(arrival.expert, self.compute(arrival, sums.inputs(arrival.expert)))
        return sums.total()

    def compute(self, arrival: Arrival, x: Tensor) -> Tensor:  # [n, D] -> [n, D]
        expert = self.bound[arrival.slot]
        if arrival.ticket is None:
            return expert(x)
        self.residency.wait(arrival, self.first_bytes)
        h = gated(x, expert.w13)  # [n, F], while w2 travels
        self.residency.wait(arrival)
        return expert.w2(h)

    def provide(
        self, layer: int, ids: list[int], weights: Tensor, ahead: list[list[int]]
    ) -> Callable[[], None]:
        """Bring a token's experts into this layer's slots: see `runtime.gpu.decoder.DecoderCache`. Call it
        after the router has run, and before `apply_step` runs on the device."""
        needed = sorted(ids)

        def shares() -> list[float]:
            return added_up(np.array([ids]), weights[None], needed)

        arrivals = self.residency.bring(Needs(layer, needed, 1, len(ids), ahead, shares))
        slots = {arrival.expert: arrival.slot for arrival in arrivals}
        self.host_slot_array[layer, : len(ids)] = [slots[e] for e in ids]
        return partial(self.residency.computed, arrivals)

    def apply_step(self, layer: int, x: Tensor, choice: Choice) -> Tensor:  # [1, D] -> [1, D]
        """`StepExperts.step` of one layer. The device reads from host memory which slots `provide` found."""
        ids, weights = choice.ids[0], choice.weights[0]
        slots = self.slot_ids[layer, : len(ids)]
        step.fetch(self.host_slot_ids[layer, : len(ids)], slots)
        return self.form.step(x, self.pool, slots, weights, ids)
