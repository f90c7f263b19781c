"""Why there is no plan for a request, and what would help. Each remedy has been tried."""

import math
from dataclasses import replace

import torch

from model.errors import ModelError
from model.quant.spec import QuantSpec
from runtime.planning.costs import Costs
from runtime.planning.plan import Plan
from runtime.planning.request import Request
from runtime.planning.search import best_plan, least_plan, used_bytes
from runtime.units import format_bytes

LEAST_CONTEXT = 128  # tokens: no refusal advises less
SMALLER = {  # the formats that a refusal may advise, widest first, and the cost that they lower
    "head": (("8", "4"), "head_bytes"),
    "experts": (("8", "4", "3", "2", "2g32", "2g64"), "blob_bytes"),
}


def refusal(request: Request) -> str:
    """One line: what is needed, what there is, and up to two remedies, each of which is enough by itself."""
    return f"{shortage(request, least_plan(request))}; {', or '.join(remedies(request))}"


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


def remedies(request: Request) -> list[str]:
    """Up to two changes to the request after which there is a plan, those that give up least first. If there
    is no such change, how much memory the request takes."""
    r, options, found = request, request.options, []
    fewer = range(r.config.experts_per_token, options.slots or 0)
    if enough := [slots for slots in fewer if best_plan(r.changed(slots=slots))]:
        found.append(f"lower --slots to {enough[-1]}")
    if options.berths is not None and best_plan(r.changed(berths=None)):
        found.append("leave out --berths")
    if options.offload == "never" and best_plan(r.changed(offload="auto", slots=None)):
        found.append("let experts be offloaded (--offload auto)")
    if context := largest_context(r):
        found.append(f"lower --context to {context}")
    if options.lookahead * options.prefetch and best_plan(r.changed(prefetch=0)):
        found.append("guess none (--prefetch 0)")
    formats = {kind: spec for kind in SMALLER if (spec := smaller_format(r, kind))}
    found += [f"quantize with --{kind} {spec} (python -m tools.quantize)" for kind, spec in formats.items()]
    if not found:
        small = least_plan(r)
        offloaded = small.arena_bytes and not r.shared
        host = f" and {rounded_up(small.arena_bytes)} of host memory" if offloaded else ""
        found.append(f"use a machine with {rounded_up(used_bytes(r, small))}{host} to give")
    return found[:2]


def largest_context(request: Request) -> int | None:
    """The longest context, shorter than requested, with which there is a plan."""
    low, high = LEAST_CONTEXT, request.context
    if best_plan(request.changed(context=low)) is None:  # nor is there one with more
        return None
    while high - low > 1:  # there is a plan with low, and none with high
        middle = (low + high) // 2
        low, high = (middle, high) if best_plan(request.changed(context=middle)) else (low, middle)
    return low


def smaller_format(request: Request, kind: str) -> str | None:
    """The widest format of the head or of experts with which there is a plan, of those with which the fewest
    experts have to be read from files again and again.

    None where memory is shared: a CPU keeps weights in another form than files do, which may be no smaller.
    """
    r, (texts, cost), found = request, SMALLER[kind], {}
    for text in () if r.shared else texts:
        formats = replace(r.formats, **{kind: QuantSpec.parse(text)})
        try:
            costs = Costs.of(r.config, formats, r.dtype, r.target, files=torch.bfloat16)
        except ModelError:  # its groups do not divide this model's matrices
            continue
        scratch = max(costs.scratch_bytes, r.costs.scratch_bytes)
        changed = replace(r.costs, scratch_bytes=scratch, **{cost: getattr(costs, cost)})
        if kind == "experts":
            changed = replace(changed, from_files=costs.from_files)
        smaller = getattr(costs, cost) < getattr(r.costs, cost)
        if smaller and (plan := best_plan(replace(r, formats=formats, costs=changed))):
            found[text] = plan.file_experts
    return min(found, key=lambda text: found[text], default=None)


def rounded_up(size: int) -> str:
    """As `format_bytes` writes sizes, but never less.

    >>> rounded_up(1023), rounded_up(1025), rounded_up(5 << 20)
    ('1023 B', '1.1 KiB', '5.0 MiB')
    """
    unit = 1024 ** (int(math.log2(size)) // 10)
    tenths = math.ceil(size * 10 / unit)
    return format_bytes(math.ceil(tenths * unit / 10))
