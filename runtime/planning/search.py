"""The plan with the most slots that the budgets allow."""

from runtime.planning.plan import Plan, lay_out
from runtime.planning.request import Request


def best_plan(request: Request) -> Plan | None:
    """The plan with the most slots that fits; None if there is no plan that fits.

    All experts are resident if that fits and `offload` is not "always". With "always", at most half of the
    experts have slots where slots and arena share a memory, or where there is no limit: otherwise no expert
    would ever be missing.
    """
    r, L, A, E = request, request.config.layers, request.config.experts_per_token, request.config.experts
    offload, slots, budget = r.options.offload, r.options.slots, r.budgets.device.bytes
    resident = lay_out(r, (E,) * L, resident=True)
    if offload != "always" and slots in (None, E) and fits(r, resident):
        return resident
    if offload == "never":
        return None
    if slots is not None:
        counts = (slots,) * L
    else:
        study = offload == "always" and (r.shared or budget is None)
        total = L * (max(A, E // 2) if study else E)
        if budget is not None:
            total = min(total, (budget - used_bytes(r, lay_out(r, (0,) * L))) // r.costs.blob_bytes)
        if total < A * L:
            return None
        counts = share_out(total, L)
    offloaded = lay_out(r, counts)
    return offloaded if fits(r, offloaded) else None


def least_plan(request: Request) -> Plan:
    """The smallest plan that the options allow, whether or not it fits."""
    r, L, options = request, request.config.layers, request.options
    wasted = r.shared and options.offload == "auto" and options.slots is None  # offloading would save nothing
    if options.offload == "never" or wasted:
        return lay_out(r, (r.config.experts,) * L, resident=True)
    return lay_out(r, (options.slots or r.config.experts_per_token,) * L)


def fits(request: Request, plan: Plan) -> bool:
    """Whether a plan keeps both budgets."""
    device, host = request.budgets.device.bytes, request.budgets.host.bytes
    return (host is None or plan.host_bytes <= host) and (
        device is None or used_bytes(request, plan) <= device
    )


def used_bytes(request: Request, plan: Plan) -> int:
    """What counts against the device's budget."""
    return plan.device_bytes + (plan.arena_bytes if request.shared else 0)


def excess_bytes(request: Request, plan: Plan) -> int:
    """By how much the mapped files and all that is allocated exceed the memory of a CPU; 0 if they fit."""
    budget = request.budgets.device.bytes
    if budget is None or not plan.mapped_bytes:
        return 0
    return max(used_bytes(request, plan) + plan.mapped_bytes - budget, 0)


def share_out(slots: int, layers: int) -> tuple[int, ...]:
    """Share `slots` out over `layers` as evenly as possible.

    The remainder goes to layers far apart, so that misses do not queue up for the link. The first layer comes
    first, because no earlier layer can guess its experts. The order of the layers is that of their numbers'
    bits read backwards. So one more slot in all gives one layer one more, and takes none from any other.

    >>> [share_out(slots, 4) for slots in (8, 9, 10, 11)]
    [(2, 2, 2, 2), (3, 2, 2, 2), (3, 2, 3, 2), (3, 3, 3, 2)]
    """
    bits = max(layers - 1, 1).bit_length()
    order = sorted(range(layers), key=lambda layer: f"{layer:0{bits}b}"[::-1])
    more = set(order[: slots % layers])
    return tuple(slots // layers + (layer in more) for layer in range(layers))
