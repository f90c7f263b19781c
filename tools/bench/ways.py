"""The ways in which a model's experts are provided, all of which a benchmark measures over the same model,
slots and ids:

    computing       nothing is copied: each layer computes from some slots, whichever experts they hold
    full            the expert cache with all its parts
    no prefetch     the expert cache, nothing copied early
    no cache        nothing kept: a token's experts are copied in every layer
    whole layers    all experts of a layer are copied before it is computed, as device maps do

A way serves `model.forward` (`experts(layer)` computes) and a `Decoder` (which talks to `cache`) alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from model.moe import Experts, mix
from model.quant.backends import fused
from model.quant.expert import BoundExpert, ExpertFormat
from model.router import Choice
from runtime.experts.cache import ExpertCache, LayerExperts
from runtime.gpu.decoder import DecoderCache

LADDER = ("full", "no prefetch", "no cache", "whole layers")


class Way(Protocol):
    """See the list above."""

    guesses: bool

    @property
    def cache(self) -> DecoderCache | None:
        """None where nothing is to be done between a choice and computing."""
        ...

    def experts(self, layer: int) -> Experts: ...


@dataclass(frozen=True)
class InPlace:
    """Computes from certain blobs, whichever they are: `model.moe.Experts`."""

    form: ExpertFormat
    blobs: Tensor  # [E, blob bytes]
    bound: Sequence[BoundExpert]

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        return mix(self.bound, x, choice)

    def step(self, x: Tensor, choice: Choice) -> Tensor:
        assert self.form.pair is not None, self.form
        return fused.expert_pair(x, self.blobs, choice.ids[0], choice.weights[0], self.form.pair)


class Computing:
    """No more than computing: of what is in the slots, each layer takes as many blobs as it has experts.

    Next to one another, layers take others, so that no cache of the device knows them: as many bytes are read
    as where all experts are resident.
    """

    cache, guesses = None, False

    def __init__(self, cache: ExpertCache) -> None:
        E, pool, self.form = cache.arena.experts, cache.pool, cache.form
        if len(pool) < E:  # of a tiny model
            pool = pool[:1].repeat(E, 1)
        self.pool, self.count = pool, E
        self.bound = [cache.form.bind(blob) for blob in pool]

    def experts(self, layer: int) -> InPlace:
        start = layer * self.count % (len(self.pool) - self.count + 1)
        rows = slice(start, start + self.count)
        return InPlace(self.form, self.pool[rows], self.bound[rows])


class Cached:
    """The expert cache, with or without guesses."""

    def __init__(self, cache: ExpertCache, guesses: bool) -> None:
        self.cache, self.guesses = cache, guesses

    def experts(self, layer: int) -> LayerExperts:
        return self.cache.layer(layer)


class Forgetful:
    """The expert cache, with slots that are empty again behind every layer."""

    guesses = False

    def __init__(self, cache: ExpertCache) -> None:
        self.inner = cache

    @property
    def cache(self) -> "Forgetful":
        return self

    def experts(self, layer: int) -> Experts:
        def computed(x: Tensor, choice: Choice) -> Tensor:
            y = self.inner.apply(layer, x, choice)
            self.forget(layer)
            return y

        return SameSlots(computed, self.inner.layer(layer).step)

    def provide(
        self, layer: int, ids: list[int], weights: Tensor, ahead: list[list[int]]
    ) -> Callable[[], None]:
        computed = self.inner.provide(layer, ids, weights, [])

        def forget() -> None:
            computed()
            self.forget(layer)

        return forget

    def forget(self, layer: int) -> None:
        table = self.inner.tables[layer]
        for slot, held in table.slots.items():
            if held.expert is not None:
                table.clear(slot, held.expert)


@dataclass(frozen=True)
class SameSlots:
    """`model.moe.Experts` of two functions."""

    apply: Callable[[Tensor, Choice], Tensor]
    step: Callable[[Tensor, Choice], Tensor]

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        return self.apply(x, choice)


class WholeLayers:
    """Every layer is copied as a whole, over the layer before, and then computed."""

    guesses = False

    def __init__(self, cache: ExpertCache) -> None:
        """The copies go to the cache's slots, as many as there are experts, and over its link."""
        self.inner = cache
        self.place: InPlace = Computing(cache).experts(0)
        self.computed = cache.copies.link.used()

    @property
    def cache(self) -> "WholeLayers":
        return self

    def experts(self, layer: int) -> Experts:
        def computed(x: Tensor, choice: Choice) -> Tensor:
            self.bring(layer)
            y = self.place(x, choice)
            self.computed_one()
            return y

        return SameSlots(computed, self.place.step)

    def provide(
        self, layer: int, ids: list[int], weights: Tensor, ahead: list[list[int]]
    ) -> Callable[[], None]:
        self.bring(layer)
        return self.computed_one

    def computed_one(self) -> None:
        self.computed = self.inner.copies.link.used()

    def bring(self, layer: int) -> None:
        copies, arena = self.inner.copies, self.inner.arena
        tickets = [
            copies.submit(arena.blob(layer, e), blob, urgent=True, free=self.computed)
            for e, blob in enumerate(self.place.blobs)
        ]
        for ticket in tickets:
            self.inner.counters.stall_seconds += copies.wait(ticket)


def make_ways(cache: ExpertCache, names: Sequence[str]) -> dict[str, Way]:
    """Of one cache: only one of them may be used at a time, with empty slots to begin with."""
    makers: dict[str, Callable[[], Way]] = {
        "computing": lambda: Computing(cache),
        "full": lambda: Cached(cache, True),
        "no prefetch": lambda: Cached(cache, False),
        "no cache": lambda: Forgetful(cache),
        "whole layers": lambda: WholeLayers(cache),
    }
    return {name: makers[name]() for name in names}
