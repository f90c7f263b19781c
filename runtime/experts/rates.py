"""How fast the link and the host are while both work, and the division of misses that rests on it.

A CPU that computes and a link that copies share the memory they read from. So each is measured while the
other works. What is measured once is recorded in the plan, because it decides which experts are computed
where, and that decides bits.
"""

import random
import time
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from model.target import Target
from runtime.errors import DeviceError, RequestError
from runtime.experts.cache import ExpertCache
from runtime.experts.exchange import Exchange
from runtime.experts.host import HostExperts
from runtime.experts.split import Split
from runtime.experts.store import Loan
from runtime.experts.tickets import Ticket
from runtime.options import EngineOptions
from runtime.planning.plan import Plan

SECONDS = 0.3  # of measuring
AHEAD = 4  # copies that wait for the link meanwhile


def divide_misses(cache: ExpertCache, plan: Plan, options: EngineOptions) -> Plan:
    """Have the host compute missed experts, as `--misses` says. Returns the plan with the rates.

    Warns if the host has no fast product for the experts. Raises `DeviceError` if it cannot compute them.
    """
    target = Target.of(torch.device("cpu"))
    form = cache.form if plan.device.type == "cpu" else cache.form.on(target, plan.dtype)
    if form.remark and plan.device.type != "cpu":  # a CPU's own experts have been warned of
        warnings.warn(
            f"missed experts in format {form.spec}: computed slowly on the CPU, because the fast product "
            f"{form.remark}",
            RuntimeWarning,
            stacklevel=5,  # the caller of Engine.load
        )
    hidden, dtype = form.shapes["w13"][1], plan.dtype
    layers = len(plan.slots_per_layer)
    host = HostExperts(form, plan.device if plan.device.type == "cuda" else None)
    cache.open_exchange(Exchange(host, layers, hidden, dtype, plan.device))
    link, cpu = options.link_gbps, options.cpu_gbps
    if link is None or cpu is None:
        try:
            measured = measure(cache, torch.ones(1, hidden, dtype=dtype, device="cpu"))
        except RequestError as error:
            raise DeviceError(str(error)) from error
        link, cpu = link or measured[0], cpu or measured[1]
    size = form.blob_bytes
    cache.residency.split = Split(size / (link * 1e9), size / (cpu * 1e9), demand=options.misses == "auto")
    return replace(plan, link_gbps=link, cpu_gbps=cpu)


def measure(cache: ExpertCache, x: Tensor) -> tuple[float, float]:  # x [1, D]
    """GB/s of the link and of the host, rounded to three digits as plans show them. The cache is empty
    afterwards."""
    assert cache.exchange is not None
    host, copies, chance = cache.exchange.host, cache.copies, random.Random(0)
    size, weights = cache.store.size, torch.ones(1, 1, device="cpu")
    blobs = [cache.store.memory(key) for key in cache.store.berths.where]
    if not blobs:  # so few berths that loading left them empty; pages that nobody has written to are all one
        arena = cache.store.arena
        blobs = [arena.berth(n)[:size].fill_(1) for n in range(cache.store.berths.count)]

    def compute() -> None:
        memory = chance.choice(blobs)
        loan = Loan(0, memory, None, Ticket(memory, memory, demand=True))
        host.wait(host.begin([loan], x, [0], weights))

    def copy(slot: Tensor) -> Ticket:
        return copies.submit(chance.choice(blobs), slot[:size], False)

    compute()  # compiles what is not compiled yet
    slots = cache.pool[: 2 * AHEAD]
    # A CPU's memory that nobody has written to is not there yet.
    for ticket in [copy(slot) for slot in slots]:
        copies.wait(ticket)
    under_way = [copy(chance.choice(slots)) for _ in range(AHEAD)]
    start, before, computed = time.perf_counter(), copies.moved, 0
    while (passed := time.perf_counter() - start) < SECONDS:
        compute()
        computed += 1
        under_way = [ticket for ticket in under_way if not ticket.complete]
        under_way += [copy(chance.choice(slots)) for _ in range(AHEAD - len(under_way))]
    moved = max(copies.moved - before, 1)
    copies.cancel_all()
    copies.settle()  # the piece under way counts no more
    cache.start_over()
    return tuple(float(f"{count / passed / 1e9:.3g}") for count in (moved, computed * size))  # type: ignore
