"""Which rank computes how many layers.

A rank's plan depends on how many layers it has, and on whether it embeds or has the head, but not on the
other ranks' layers. So what counts adds up over ranks, and the best shares are found exactly, rank by rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from runtime.errors import DeviceError, OptionError
from runtime.options import EngineOptions
from runtime.planning.costs import count_weights
from runtime.planning.device import pick_dtype
from runtime.planning.memory import NCCL_BYTES
from runtime.planning.offer import Offer, share_memory
from runtime.planning.plan import Plan, chunk_tokens
from runtime.planning.refusal import remedies, rounded_up, shortage
from runtime.planning.request import Budget, Budgets, Request
from runtime.planning.search import best_plan, excess_bytes, least_plan

Cost = tuple[int, int, int, int]  # compared from left to right


@dataclass(frozen=True)
class JointRequest:
    """All that the plans of several ranks depend on. The letters are P for the ranks and L for the layers."""

    config: ModelConfig  # of the whole model
    formats: Formats
    options: EngineOptions
    offers: tuple[Offer, ...]  # by rank
    files: torch.dtype | None = None  # `Checkpoint.mappable`
    more: int = 0  # bytes that every memory has besides

    @property
    def context(self) -> int:
        return self.single[0].context

    def changed(self, **options: Any) -> "JointRequest":
        """The same request with other values for some options."""
        return replace(self, options=replace(self.options, **options))

    @cached_property
    def single(self) -> list[Request]:
        """By rank, the request for one layer. All ranks cut prompts alike: as the one that takes the fewest
        tokens would if it had the whole model."""
        asked = [self.ask(rank, budgets) for rank, budgets in enumerate(share_memory(self.offers))]
        chunk = min(chunk_tokens(replace(request, config=self.config)) for request in asked)
        return [replace(request, chunk=chunk) for request in asked]

    def ask(self, rank: int, budgets: Budgets) -> Request:
        """The request for one layer, with a chunk of its own."""
        offer, P = self.offers[rank], len(self.offers)
        options, weights = offer.options(self.options), sum(count_weights(self.config))
        dtype = pick_dtype(options.dtype, offer.target, weights, self.formats.quantized, offer.bfloat16)
        request = Request.make(
            replace(self.config, layers=1),
            self.formats,
            replace(options, dtype=str(dtype).removeprefix("torch."), berths=None),
            offer.target,
            Budgets(enlarged(budgets.device, self.more), enlarged(budgets.host, self.more)),
            self.files,
            embeds=rank == 1 % P,
            heads=rank == 0,
        )
        if offer.target.is_gpu:  # whose overhead it has measured itself
            driver = offer.driver_bytes + NCCL_BYTES * self.beside_gpus(rank)
            costs = replace(request.costs, driver_bytes=driver, overhead_bytes=offer.overhead_bytes)
            request = replace(request, costs=costs)
        return request.changed(berths=self.options.berths)

    def beside_gpus(self, rank: int) -> bool:
        """Whether the rank before or after this one has another GPU."""
        ring = [self.offers[(rank + way) % len(self.offers)] for way in (-1, 1)]
        near = {(offer.host, offer.card) for offer in ring if offer.target.is_gpu}
        own = self.offers[rank]
        return own.target.is_gpu and bool(near - {(own.host, own.card)})

    def request(self, rank: int, layers: int) -> Request:
        """What this rank plans if it has so many layers."""
        return replace(self.single[rank], config=replace(self.config, layers=layers))

    def plan(self, rank: int, layers: int) -> Plan | None:
        """Its plan; None if so many layers do not fit."""
        r = self.request(rank, layers)
        berths = r.options.berths
        if berths is not None and berths < r.experts and not r.costs.from_files:
            return None
        return best_plan(r)

    @cached_property
    def most(self) -> int:
        """Layers that a rank can have, since each other one has at least one."""
        return self.config.layers - len(self.offers) + 1

    @cached_property
    def costs(self) -> list[dict[int, Cost]]:
        """By rank, what counts for each number of layers that fits."""
        has_gpu = any(offer.target.is_gpu for offer in self.offers)
        found: list[dict[int, Cost]] = []
        for rank, offer in enumerate(self.offers):
            plans = {layers: self.plan(rank, layers) for layers in range(1, self.most + 1)}
            on_cpu = has_gpu and not offer.target.is_gpu
            made = {n: self.cost(rank, plan, on_cpu) for n, plan in plans.items() if plan is not None}
            found.append(made)
        return found

    def cost(self, rank: int, plan: Plan, on_cpu: bool) -> Cost:
        """What counts, in this order: experts that are read from files again and again, experts without a
        slot of their own, layers on a CPU if there is a GPU, and how even the shares are."""
        layers = len(plan.slots_per_layer)
        excess = excess_bytes(self.request(rank, layers), plan)  # of mapped files
        from_files = plan.file_experts + -(-excess // plan.blob_bytes)
        without = 0 if plan.resident else plan.experts - sum(plan.slots_per_layer)
        return from_files, without, layers * on_cpu, layers * layers

    @cached_property
    def shares(self) -> tuple[int, ...] | None:
        """Layers by rank, the best that fit; None if none do. Of equal shares, the first ranks have the
        fewest."""
        if self.options.rank_layers is not None:
            given = tuple(map(int, self.options.rank_layers.split(",")))
            fit = all(layers in costs for layers, costs in zip(given, self.costs, strict=True))
            return given if fit else None
        best: dict[int, tuple[Cost, tuple[int, ...]]] = {
            0: ((0, 0, 0, 0), ())
        }  # by layers of the ranks so far
        for costs in reversed(self.costs):
            further: dict[int, tuple[Cost, tuple[int, ...]]] = {}
            for layers, cost in costs.items():
                for before, (sum_before, shares) in best.items():
                    a, b = cost, sum_before
                    made = (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]), (layers, *shares)
                    total = layers + before
                    if total <= self.config.layers and (total not in further or made < further[total]):
                        further[total] = made
            best = further
        return best[self.config.layers][1] if self.config.layers in best else None


def share_layers(
    config: ModelConfig,
    formats: Formats,
    options: EngineOptions,
    offers: Sequence[Offer],
    files: torch.dtype | None = None,
) -> tuple[int, ...]:
    """Layers by rank, at least one for each. `files` is `Checkpoint.mappable`.

    Raises `DeviceError`, with numbers and what would help, if nothing fits, and `OptionError` if an option
    does not fit the model or the ranks.
    """
    asked = JointRequest(config, formats, options, tuple(offers), files)
    check(asked)
    if asked.shares is None:
        raise DeviceError(refusal(asked))
    return asked.shares


def check(asked: JointRequest) -> None:
    """Raises `OptionError` if an option makes no sense for this model and these ranks."""
    offers, L, given = asked.offers, asked.config.layers, asked.options.rank_layers
    P, vram = len(offers), next((offer.memory for offer in offers if offer.memory.option == "vram"), None)
    if P > L:
        raise OptionError(f"there are {P} ranks, and the model has {L} layers; start at most {L} ranks")
    if vram is None and asked.options.vram is not None:
        raise OptionError(
            f"vram is {asked.options.vram}, and every rank computes on its CPU; limit it with --ram"
        )
    layers = [int(number) for number in given.split(",")] if given else []
    if given and len(layers) != P:
        raise OptionError(f"rank_layers is {given}, and there are {P} ranks; give as many numbers")
    if given and sum(layers) != L:
        raise OptionError(
            f"rank_layers is {given}, {sum(layers)} in all, and the model has {L} layers; make it {L} in all"
        )
    check_berths(asked, layers or [1] * P)


def check_berths(asked: JointRequest, least: Sequence[int]) -> None:
    """Raises `OptionError` if a rank cannot read experts from files, and has too few berths for those of so
    many layers, or for any share."""
    berths, E, L = asked.options.berths, asked.config.experts, asked.config.layers
    if berths is None:
        return
    most = [L if request.costs.from_files else berths // E for request in asked.single]
    if sum(most) < L or any(room < layers for room, layers in zip(most, least, strict=True)):
        raise OptionError(
            f"berths is {berths} on each of {len(asked.offers)} ranks, and all {L * E} experts need one, "
            "because files do not have them as memory keeps them; quantize them (python -m tools.quantize)"
        )


def refusal(asked: JointRequest) -> str:
    """One line: what is needed, what there is, and up to two remedies, each of which is enough by itself."""
    given, offers, found = asked.options.rank_layers, asked.offers, []
    least = [1] * len(offers) if given is None else [int(number) for number in given.split(",")]
    lacking = [rank for rank, layers in enumerate(least) if layers not in asked.costs[rank]]
    if lacking:
        rank, layers = lacking[0], least[lacking[0]]
        request = asked.request(rank, layers)
        lack = f"rank {rank} ({offers[rank].place}) has no room for {layers} layer{'s' * (layers > 1)}: "
        lack += shortage(request, least_plan(request))
        rest = replace(asked, offers=(*offers[:rank], *offers[rank + 1 :]))
        if given is None and rest.offers and rest.shares:
            found.append(f"leave rank {rank} out")
    else:
        rooms = [
            f"{max(costs)} on rank {rank} ({offers[rank].place})" for rank, costs in enumerate(asked.costs)
        ]
        lack = f"the model has {asked.config.layers} layers, and there is room for {', '.join(rooms)}"
    if given is not None and asked.changed(rank_layers=None).shares:
        found.append("leave out --rank-layers")
    found += remedies(asked, left_to_files, in_format)
    return f"{lack}; {', or '.join(found[:2] or [more_memory(asked)])}"


def left_to_files(asked: JointRequest) -> int | None:
    """How many experts the best shares leave to files; None if nothing fits."""
    shares = asked.shares
    if shares is None:
        return None
    return sum(costs[layers][0] for layers, costs in zip(shares, asked.costs, strict=True))


def in_format(asked: JointRequest, kind: str, spec: QuantSpec) -> JointRequest | None:
    """The request for a model whose head or experts are quantized so. None if they would be no smaller, or
    cannot be quantized so."""
    now, K = asked.formats.by_kind()[kind], asked.config.hidden
    if spec.bits_per_weight(K) >= now.bits_per_weight(K):
        return None
    smaller = replace(asked, formats=replace(asked.formats, **{kind: spec}), files=torch.bfloat16)
    try:
        assert smaller.single
    except ModelError:  # its groups do not divide this model's matrices
        return None
    return smaller


def more_memory(asked: JointRequest) -> str:
    """How much more of every memory would be enough, to the next tenth of a unit."""
    low, high = 0, 1 << 20
    while replace(asked, more=high).shares is None:  # no option forbids it, since `check` has passed
        low, high = high, 2 * high
    while high - low > high >> 10:
        middle = (low + high) // 2
        low, high = (low, middle) if replace(asked, more=middle).shares else (middle, high)
    return f"give each rank {rounded_up(high)} more"


def enlarged(budget: Budget, more: int) -> Budget:
    return budget if budget.bytes is None else replace(budget, bytes=budget.bytes + more)
