"""The plan with the most slots and berths that the budgets allow."""

from runtime.experts.tiers import SPARE_BERTHS
from runtime.planning.plan import Plan, berth_bytes, lay_out
from runtime.planning.request import Request


def best_plan(request: Request) -> Plan | None:
    """The plan with the most slots that fits; None if there is no plan that fits.

    All experts are resident if that fits and `offload` is not "always". Otherwise all of them have berths if
    that fits. If not, and if files have experts as memory keeps them, as many have berths as fit.
    """
    r, E, offload = request, request.config.experts, request.options.offload
    resident = lay_out(r, (E,) * r.config.layers, resident=True)
    if offload != "always" and r.options.slots in (None, E) and fits(r, resident):
        return resident
    if not may_offload(r):
        return None
    wish = r.options.berths
    if wish is not None and (wish >= r.experts or r.costs.from_files):
        return with_berths(r, min(wish, r.experts))
    return with_berths(r, r.experts) or (with_fewer_berths(r) if r.costs.from_files else None)


def may_offload(request: Request) -> bool:
    """Whether the options allow slots. On a CPU these are host memory too, so nothing is offloaded unless the
    user asks for it."""
    r, options = request, request.options
    asked = options.offload == "always" or options.slots is not None or options.berths is not None
    return options.offload != "never" and (asked or not r.shared)


def with_berths(request: Request, berths: int) -> Plan | None:
    """The plan with so many berths and the most slots that fits; None if there is none.

    With `offload` "always", at most half of the experts have slots where slots and berths share a memory, or
    where there is no limit: otherwise no expert would ever be missing.
    """
    r, L, A, E = request, request.config.layers, request.config.experts_per_token, request.config.experts
    offload, slots, budget = r.options.offload, r.options.slots, r.budgets.device.bytes
    if slots is not None:
        counts = (slots,) * L
    else:
        study = offload == "always" and (r.shared or budget is None)
        total = L * (max(A, E // 2) if study else E)
        if budget is not None:
            none = lay_out(r, (0,) * L, berths=berths)
            total = min(total, (budget - used_bytes(r, none)) // r.costs.blob_bytes)
        if total < A * L:
            return None
        counts = share_out(total, L)
    plan = lay_out(r, counts, berths=berths)
    return plan if fits(r, plan) else None


def with_fewer_berths(request: Request) -> Plan | None:
    """The plan with as many berths as fit, but fewer than experts; None if there is none.

    Where slots and berths share a memory, layers have the fewest slots, so that less is read from files.
    """
    r, budget, beside = request, request.budgets.host.bytes, 0
    if r.shared:
        r = r.changed(slots=least_slots(r)[0])
        budget, beside = r.budgets.device.bytes, lay_out(r, least_slots(r), berths=SPARE_BERTHS).device_bytes
    if budget is None:  # then it is the device that is too small, also without spares to write back through
        return None
    berths = min((budget - beside) // berth_bytes(r, tiered=True), r.experts - 1)
    return with_berths(r, berths) if berths >= SPARE_BERTHS else None


def least_slots(request: Request) -> tuple[int, ...]:
    """Those that the user asks for, or that a token needs."""
    return (request.options.slots or request.config.experts_per_token,) * request.config.layers


def least_plan(request: Request) -> Plan:
    """The smallest plan that the options allow, whether or not it fits. On a GPU all experts have berths if
    the host has room for them."""
    r, counts, host = request, least_slots(request), request.budgets.host.bytes
    if not may_offload(r):
        return lay_out(r, (r.config.experts,) * r.config.layers, resident=True)
    every = lay_out(r, counts)
    if r.options.berths is not None or not r.costs.from_files:
        return every
    fewest = lay_out(r, counts, berths=SPARE_BERTHS)
    if r.shared:
        return min(every, fewest, key=lambda plan: used_bytes(r, plan))
    return every if host is None or every.host_bytes <= host else fewest


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
