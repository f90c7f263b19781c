"""The ways to provide a model's experts that the benchmarks compare, all over the same model, slots and ids:

computing       nothing is copied: each layer computes from some slots, regardless of what they hold
full            the expert cache with all its parts
no prefetch     the expert cache, with nothing copied early
no cache        nothing is kept: a token's experts are copied in every layer
whole layers    all experts of a layer are copied before it is computed, as device maps do
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from model.moe import Experts, mix
from model.quant.expert import BoundExpert, ExpertFormat
from model.router import Choice
from runtime.experts.cache import ExpertCache, LayerExperts

FORGETFUL = ("no cache", "whole layers")
LADDER = ("full", "no prefetch", *FORGETFUL)


@dataclass(frozen=True)
class Way:
    """One of the list above."""

    experts: Callable[[int], Experts]  # of each layer
    cache: ExpertCache | None = (
        None  # for a decoder; None where nothing happens between choosing and computing
    )
    guesses: bool = False  # whether routers look ahead


def make_ways(cache: ExpertCache, names: Sequence[str]) -> dict[str, Way]:
    """The ways of these names over one cache. Use one at a time, and begin each with empty slots."""
    forgetful, whole = cast(ExpertCache, Forgetful(cache)), cast(ExpertCache, WholeLayers(cache))
    ways = {
        "computing": Way(in_slots(cache)),
        "full": Way(cache.layer, cache, guesses=True),
        "no prefetch": Way(cache.layer, cache),
        "no cache": Way(lambda layer: LayerExperts(forgetful, layer), forgetful),
        "whole layers": Way(lambda layer: LayerExperts(whole, layer), whole),
    }
    return {name: ways[name] for name in names}


@dataclass(frozen=True)
class InPlace:
    """Computes from certain blobs: `model.moe.StepExperts`."""

    form: ExpertFormat
    blobs: Tensor  # [E, blob bytes]
    bound: Sequence[BoundExpert]

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        return mix(self.bound, x, choice)

    rest = None  # `step` computes all experts

    def step(self, x: Tensor, choice: Choice) -> Tensor:
        return self.form.step(x, self.blobs, choice.ids[0], choice.weights[0])


def in_slots(cache: ExpertCache) -> Callable[[int], InPlace]:
    """Each layer computes from as many slots as it has experts.

    Neighboring layers take different slots, so that no cache of the device holds them: as many bytes are read
    as with all experts resident.
    """
    E, pool = cache.store.experts, cache.pool
    if len(pool) < E:  # of a tiny model
        pool = pool[:1].repeat(E, 1)
    bound = [cache.form.bind(blob) for blob in pool]

    def layer(number: int) -> InPlace:
        start = number * E % (len(pool) - E + 1)
        return InPlace(cache.form, pool[start : start + E], bound[start : start + E])

    return layer


class Forgetful:
    """Stands in for an expert cache: its slots are empty again after every layer."""

    divided, exchange = False, None

    def __init__(self, cache: ExpertCache) -> None:
        self.inner, self.apply_step = cache, cache.apply_step

    def apply(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        y = self.inner.apply(layer, x, choice)
        self.forget(layer)
        return y

    def provide(
        self, layer: int, ids: list[int], weights: Tensor, ahead: list[list[int]]
    ) -> Sequence[Callable[[], object]]:
        (computed,) = self.inner.provide(layer, ids, weights, [])

        def forget() -> None:
            computed()
            self.forget(layer)

        return (forget,)

    def forget(self, layer: int) -> None:
        table = self.inner.residency.tables[layer]
        for slot, held in table.slots.items():
            if held.expert is not None:
                table.clear(slot, held.expert)


class WholeLayers:
    """Stands in for an expert cache: copies each layer as a whole over the layer before it. Copies go over
    the cache's link to as many of its slots as a layer has experts."""

    divided, exchange = False, None

    def __init__(self, cache: ExpertCache) -> None:
        self.inner, self.place = cache, in_slots(cache)(0)
        self.computed = cache.copies.link.used()

    def apply(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        self.bring(layer)
        y = self.place(x, choice)
        self.mark()
        return y

    def apply_step(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        return self.place.step(x, choice)

    def provide(
        self, layer: int, ids: list[int], weights: Tensor, ahead: list[list[int]]
    ) -> Sequence[Callable[[], object]]:
        self.bring(layer)
        return (self.mark,)

    def mark(self) -> None:
        """The layer is computed: the next one may be copied over it."""
        self.computed = self.inner.copies.link.used()

    def bring(self, layer: int) -> None:
        copies, store = self.inner.copies, self.inner.store
        tickets = [
            copies.submit(store.memory(store.key(layer, e)), blob[: store.size], True, self.computed)
            for e, blob in enumerate(self.place.blobs)
        ]
        for ticket in tickets:
            self.inner.ledger.counters.stall_seconds += copies.wait(ticket)
