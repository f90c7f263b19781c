"""Why there is no plan for a request, and what would help. Each remedy has been tried."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.quant.spec import QuantSpec
from runtime.options import EngineOptions
from runtime.planning.costs import Costs
from runtime.planning.plan import Plan
from runtime.planning.request import Request
from runtime.planning.search import best_plan, least_plan, used_bytes
from runtime.units import format_bytes

LEAST_CONTEXT = 128  # tokens: no refusal advises less
SMALLER = {  # the formats that a refusal may advise, widest first
    "head": ("8", "4"),
    "experts": ("8", "4", "3", "2", "2g32", "2g64"),
}
COSTS = {"head": "head_bytes", "experts": "blob_bytes"}  # what they lower

A = TypeVar("A", bound="Asked")


def refusal(request: Request) -> str:
    """One line: what is needed, what there is, and up to two remedies, each of which is enough by itself."""
    found = remedies(request, left_to_files, in_format) or [more_memory(request)]
    return f"{shortage(request, least_plan(request))}; {', or '.join(found)}"


def shortage(request: Request, small: Plan) -> str:
    """What even the smallest plan needs, and what there is."""
    r, (budget, place) = request, (request.budgets.device.bytes, request.budgets.device.place)
    if budget is None or used_bytes(r, small) <= budget:
        host, every = r.budgets.host, f"{r.config.experts} experts in each of {r.config.layers} layers"
        what = f"{small.berths} berths" if small.tiered else every
        return (
            f"need {format_bytes(small.arena_bytes)} of {host.place} for {what}, "
            f"and the budget is {format_bytes(host.bytes or 0)}"
        )
    if small.resident:
        used = format_bytes(used_bytes(r, small))
        return f"need {used} of {place} ({small}), and the budget is {format_bytes(budget)}"
    names = ["trunk", "kv", "workspace", "staging", "overhead", "driver"] + ["arena"] * r.shared
    sizes = {name: getattr(small, f"{name}_bytes") for name in names}
    beside = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size)
    left = max(budget - sum(sizes.values()), 0)
    return (
        f"need {format_bytes(small.slots_bytes)} for {small.slots_per_layer[0]} slots per layer, and "
        f"{format_bytes(budget)} of {place} leave {format_bytes(left)} beside {beside}"
    )


class Asked(Protocol):
    """What a plan is asked for: a `Request`, or several ranks' together (`runtime.planning.sharing`)."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def options(self) -> EngineOptions: ...

    @property
    def context(self) -> int: ...

    def changed(self: A, **options: Any) -> A: ...


def remedies(
    asked: A, outcome: Callable[[A], int | None], in_format: Callable[[A, str, QuantSpec], A | None]
) -> list[str]:
    """Up to two changes after which there is a plan, those that give up least first.

    `outcome` says how many experts a plan leaves to the files; None if there is no plan. `in_format` asks for
    a model whose head or experts are quantized so; None if that makes no sense.
    """
    options, found = asked.options, []
    fewer = range(asked.config.experts_per_token, options.slots or 0)
    if enough := [slots for slots in fewer if outcome(asked.changed(slots=slots)) is not None]:
        found.append(f"lower --slots to {enough[-1]}")
    if options.berths is not None and outcome(asked.changed(berths=None)) is not None:
        found.append("leave out --berths")
    if options.offload == "never" and outcome(asked.changed(offload="auto", slots=None)) is not None:
        found.append("let experts be offloaded (--offload auto)")
    if context := largest_context(asked, outcome):
        found.append(f"lower --context to {context}")
    if options.lookahead * options.prefetch and outcome(asked.changed(prefetch=0)) is not None:
        found.append("guess none (--prefetch 0)")
    for kind, texts in SMALLER.items():
        tried = {text: in_format(asked, kind, QuantSpec.parse(text)) for text in texts}
        left = {text: outcome(smaller) for text, smaller in tried.items() if smaller is not None}
        known = {text: count for text, count in left.items() if count is not None}
        if known:  # the widest of those that leave the fewest experts to files
            spec = min(known, key=lambda text: known[text])
            found.append(f"quantize with --{kind} {spec} (python -m tools.quantize)")
    return found[:2]


def largest_context(asked: A, outcome: Callable[[A], int | None]) -> int | None:
    """The longest context, shorter than requested, with which there is a plan."""
    low, high = LEAST_CONTEXT, asked.context
    if outcome(asked.changed(context=low)) is None:  # nor is there one with more
        return None
    while high - low > 1:  # there is a plan with low, and none with high
        middle = (low + high) // 2
        fits = outcome(asked.changed(context=middle)) is not None
        low, high = (middle, high) if fits else (low, middle)
    return low


def more_memory(request: Request) -> str:
    """The memory that a machine would need."""
    small = least_plan(request)
    offloaded = small.arena_bytes and not request.shared
    host = f" and {rounded_up(small.arena_bytes)} of host memory" if offloaded else ""
    return f"use a machine with {rounded_up(used_bytes(request, small))}{host} to give"


def left_to_files(request: Request) -> int | None:
    """How many experts the best plan leaves to the files; None if there is no plan."""
    plan = best_plan(request)
    return None if plan is None else plan.file_experts


def in_format(request: Request, kind: str, spec: QuantSpec) -> Request | None:
    """The request for a model whose head or experts are quantized so. None if they would be no smaller, or
    cannot be quantized so.

    None where memory is shared, too: a CPU keeps weights in another form than files do, which may be no
    smaller.
    """
    r, cost = request, COSTS[kind]
    if r.shared:
        return None
    formats = replace(r.formats, **{kind: spec})
    try:
        costs = Costs.of(r.config, formats, r.dtype, r.target, torch.bfloat16, embeds=r.embeds, heads=r.heads)
    except ModelError:  # its groups do not divide this model's matrices
        return None
    if getattr(costs, cost) >= getattr(r.costs, cost):
        return None
    scratch = max(costs.scratch_bytes, r.costs.scratch_bytes)
    changed = replace(r.costs, scratch_bytes=scratch, **{cost: getattr(costs, cost)})
    if kind == "experts":
        changed = replace(changed, from_files=costs.from_files)
    return replace(r, formats=formats, costs=changed)


def rounded_up(size: int) -> str:
    """As `format_bytes` writes sizes, but never less.

    >>> rounded_up(1023), rounded_up(1025), rounded_up(5 << 20)
    ('1023 B', '1.1 KiB', '5.0 MiB')
    """
    unit = 1024 ** (int(math.log2(size)) // 10)
    tenths = math.ceil(size * 10 / unit)
    return format_bytes(math.ceil(tenths * unit / 10))
