"""Which experts are where: worked out, before anything is allocated, from a configuration and a budget.

Everything that every token needs (the trunk), the KV cache and the activations of one prefill chunk come
first; what is left holds experts. Where that is enough for all of them they are resident. Where it is not,
each layer gets as many slots as fit, spare slots take experts that are only guessed to be needed, and an
arena in host memory holds every expert.
"""

import math
from dataclasses import replace

import torch

from model.attention import Attending
from model.config import ModelConfig
from model.errors import ModelError
from model.quant.expert import blob_bytes
from model.quant.product import scratch_bytes
from model.quant.spec import QuantSpec
from runtime.errors import DeviceError, OptionError
from runtime.options import OFFLOAD
from runtime.planning.footprint import PREFILL_CHUNK, Plan, Request, count_weights, lay_out
from runtime.units import format_bytes

__all__ = ["PREFILL_CHUNK", "Plan", "count_weights", "plan"]

LEAST_CONTEXT = 128  # tokens: no refusal advises less
SMALLER = ("8", "4", "3", "2", "2g32", "2g64")  # formats that a refusal may advise, largest first


def plan(
    config: ModelConfig,
    dtype: torch.dtype,
    context: int,
    attention: int | None = None,
    expert: int | None = None,
    scratch: int = 0,
    driver: int = 0,
    *,
    overhead: int = 0,
    attending: Attending = Attending.MASK,
    budget: int | None = None,
    host_budget: int | None = None,
    shared: bool = False,
    slots: int | None = None,
    lookahead: int = 1,
    prefetch: int = 1,
    offload: str = "auto",
    place: str = "device memory",
    host_place: str = "host memory",
) -> Plan:
    """The most slots that fit.

    A layer's `attention` projections and one `expert` take that many bytes in memory (None: what they take in
    `dtype`), and products with quantized ones `scratch` bytes more for as long as they last; a GPU's `driver`
    takes some that are no tensors, and its allocator some `overhead`. `attending` is
    how attention of a prompt is computed. Of the device
    `budget` bytes may be used, and of the host `host_budget` for the arena (None: no limit); where the device
    computes from host memory they are `shared`, and the arena counts against `budget`. `place` and
    `host_place` are what messages call the two.

    `offload` is "never" (all experts resident), "always" (never so), or "auto": resident if that fits.
    `slots` is how many each layer shall have; fewer than all experts means offloading, whatever would fit.
    With "always", at most half of the experts have slots where memory is shared or without limit: the whole
    path would otherwise be there and idle. One spare slot is for each of `prefetch` guesses, `lookahead`
    layers ahead.

    Raises `OptionError` for slots that the model has no use for, and `DeviceError`, with numbers and what
    would help, for what does not fit.

    >>> mixtral = ModelConfig(
    ...     vocab=32000, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, experts=8,
    ...     experts_per_token=2, context=32768, rope_theta=1e6, norm_eps=1e-5)
    >>> print(plan(mixtral, torch.bfloat16, context=4096))
    87.9 GiB: trunk 3.0 GiB, experts 84.0 GiB, kv 512.0 MiB, workspace 392.5 MiB; context 4096 tokens
    >>> print(plan(mixtral, torch.bfloat16, context=4096, budget=40 << 30))
    39.7 GiB: trunk 3.0 GiB, slots 35.4 GiB, kv 512.0 MiB, workspace 424.5 MiB, staging 348.0 MiB; context 4096 tokens
    slots: 3 in 20 layers, 4 in 12; 1 spare; 336.0 MiB an expert; arena 84.0 GiB of host memory
    """  # noqa: E501
    request = Request(
        config, dtype, context, attention, expert, scratch, driver, overhead, attending, budget, host_budget,
        shared, slots, lookahead, prefetch, offload,
    )  # fmt: skip
    check(request)
    best = choose(request)
    if best is None:
        raise DeviceError(refusal(request, place, host_place))
    return best


def check(request: Request) -> None:
    """Raises `OptionError` for what fits no memory at all."""
    A, E, slots = request.config.experts_per_token, request.config.experts, request.slots
    if request.offload not in OFFLOAD:
        raise OptionError(f"offload is {request.offload!r}, and must be one of {', '.join(OFFLOAD)}")
    if slots is None:
        return
    if not A <= slots <= E:
        raise OptionError(
            f"slots is {slots}, and must be from {A}, which a token uses, to {E}, which a layer has"
        )
    if request.offload == "never" and slots < E:
        raise OptionError(
            f"slots is {slots} and offload is 'never', which keeps all {E}; leave one of them out"
        )


def choose(request: Request) -> Plan | None:
    """The plan with the most slots that the budgets allow; None if they allow none."""
    r, L, A, E = request, request.config.layers, request.config.experts_per_token, request.config.experts
    resident = lay_out(r, (E,) * L, resident=True)
    if r.offload != "always" and r.slots in (None, E) and r.allows(resident):
        return resident
    if r.offload == "never":
        return None
    if r.slots is not None:
        counts = (r.slots,) * L
    else:
        study = r.offload == "always" and (r.shared or r.budget is None)
        total = L * (max(A, E // 2) if study else E)
        if r.budget is not None:
            total = min(total, (r.budget - r.used(lay_out(r, (0,) * L))) // r.blob)
        if total < A * L:
            return None
        counts = share_out(total, L)
    offloaded = lay_out(r, counts)
    return offloaded if r.allows(offloaded) else None


def share_out(slots: int, layers: int) -> tuple[int, ...]:
    """So many slots over so many layers, as evenly as can be.

    Those that are left over go to layers far apart, so that misses do not queue up for the link, and to the
    first layer before any other, because no earlier layer can guess its experts. Layers take their turns in
    the order of their numbers' bits read backwards: then one more slot in all is one more for some layer, and
    one less for none.

    >>> [share_out(slots, 4) for slots in (8, 9, 10, 11)]
    [(2, 2, 2, 2), (3, 2, 2, 2), (3, 2, 3, 2), (3, 3, 3, 2)]
    """
    bits = max(layers - 1, 1).bit_length()
    order = sorted(range(layers), key=lambda layer: f"{layer:0{bits}b}"[::-1])
    more = set(order[: slots % layers])
    return tuple(slots // layers + (layer in more) for layer in range(layers))


def least(request: Request) -> Plan:
    """The smallest plan that the request is content with."""
    r, L = request, request.config.layers
    in_vain = r.shared and r.offload == "auto" and r.slots is None  # offloading to the same memory saves none
    if r.offload == "never" or in_vain:
        return lay_out(r, (r.config.experts,) * L, resident=True)
    return lay_out(r, (r.slots or r.config.experts_per_token,) * L)


def refusal(request: Request, place: str, host_place: str) -> str:
    """Why there is no plan, and what would help: each remedy has been tried, and is enough by itself."""
    r, small = request, least(request)
    if r.budget is None or r.used(small) <= r.budget:
        host = format_bytes(r.host_budget or 0)
        need = (
            f"need {format_bytes(small.arena_bytes)} of {host_place} for {r.config.experts} experts "
            f"in each of {r.config.layers} layers, and the budget is {host}"
        )
    elif small.resident:
        used, budget = format_bytes(r.used(small)), format_bytes(r.budget)
        need = f"need {used} of {place} ({small}), and the budget is {budget}"
    else:
        names = ["trunk", "kv", "workspace", "staging", "overhead", "driver"] + ["arena"] * r.shared
        sizes = {name: getattr(small, f"{name}_bytes") for name in names}
        beside = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size)
        left = max(r.budget - sum(sizes.values()), 0)
        need = (
            f"need {format_bytes(small.slots_bytes)} for {small.slots_per_layer[0]} slots per layer, and "
            f"{format_bytes(r.budget)} of {place} leave {format_bytes(left)} beside {beside}"
        )
    return f"{need}; {', or '.join(remedies(r))}"


def remedies(request: Request) -> list[str]:
    """Changes to the request after which there is a plan, those that give up least first, two at most; or how
    much memory it takes, where there is no such change."""
    r, A, found = request, request.config.experts_per_token, []
    if fewer := [n for n in range(A, r.slots or 0) if choose(replace(r, slots=n))]:
        found.append(f"lower --slots to {fewer[-1]}")
    if r.offload == "never" and choose(replace(r, offload="auto", slots=None)):
        found.append("let experts be offloaded (--offload auto)")
    if context := largest_context(r):
        found.append(f"lower --context to {context}")
    if r.lookahead * r.prefetch and choose(replace(r, prefetch=0)):
        found.append("guess none (--prefetch 0)")
    if spec := smaller_experts(r):
        found.append(f"quantize with --experts {spec}")
    if not found:
        small = least(r)
        host = (
            f" and {rounded_up(small.arena_bytes)} of host memory"
            if small.arena_bytes and not r.shared
            else ""
        )
        found.append(f"use a machine with {rounded_up(r.used(small))}{host} to give")
    return found[:2]


def rounded_up(size: int) -> str:
    """As `format_bytes` writes sizes, but never less.

    >>> rounded_up(1023), rounded_up(1025), rounded_up(5 << 20)
    ('1023 B', '1.1 KiB', '5.0 MiB')
    """
    unit = 1024 ** (int(math.log2(size)) // 10)
    tenths = math.ceil(size * 10 / unit)
    return format_bytes(math.ceil(tenths * unit / 10))


def largest_context(request: Request) -> int | None:
    """The most tokens of context, fewer than asked for, with which there is a plan."""
    low, high = LEAST_CONTEXT, request.context
    if choose(replace(request, context=low)) is None:  # nor would there be with more
        return None
    while high - low > 1:  # there is a plan with low, and none with high
        middle = (low + high) // 2
        low, high = (low, middle) if choose(replace(request, context=middle)) is None else (middle, high)
    return low


def smaller_experts(request: Request) -> str | None:
    """The widest format of experts with which there is a plan. None as well where memory is shared: what a
    CPU keeps of an expert is not what files have, and may be no less."""
    c = request.config
    expanded = scratch_bytes(torch.device("cuda"), max(c.hidden, c.ffn), request.dtype)
    scratch = max(request.scratch, expanded)
    for spec in () if request.shared else SMALLER:
        try:
            size = blob_bytes(c, QuantSpec.parse(spec), request.dtype, torch.device("cuda"))
        except ModelError:  # its groups do not divide this model's matrices
            continue
        if size < request.blob and choose(replace(request, expert=size, scratch=scratch)):
            return spec
    return None
