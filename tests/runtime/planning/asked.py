"""Requests for plans of a small model, any part of which a test may choose."""

from dataclasses import replace
from typing import Any

import torch

from model.attention import Attending
from model.config import ModelConfig
from model.quant.formats import PLAIN
from model.target import Target
from runtime import EngineOptions
from runtime.planning.plan import Plan
from runtime.planning.planner import make_plan
from runtime.planning.request import Budget, Budgets, Request

CPU = torch.device("cpu")
CARD = Target.hypothetical()
SMALL = ModelConfig(
    vocab=320, hidden=96, layers=3, heads=6, kv_heads=2, head_dim=32, ffn=80, experts=5,
    experts_per_token=2, context=4096, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip


def asked(
    config: ModelConfig,
    dtype: torch.dtype,
    context: int,
    *,
    expert: int | None = None,
    head: int | None = None,
    scratch: int = 0,
    overhead: int = 0,
    driver: int = 0,
    attending: Attending = Attending.MASK,
    budget: int | None = None,
    host_budget: int | None = None,
    place: str = "device memory",
    host_place: str = "host memory",
    shared: bool = False,
    from_files: bool = False,
    **options: Any,
) -> Request:
    """A request for a 16-bit model whose costs are these; None is the plain size of an expert or a head.
    `from_files` says that experts can be read from files one by one."""
    target = Target(CPU) if shared else CARD
    wishes = EngineOptions(dtype=str(dtype).removeprefix("torch."), context=context, map=False, **options)
    budgets = Budgets(Budget(budget, place), Budget(host_budget, host_place))
    request = Request.make(config, PLAIN, wishes, target, budgets, dtype if from_files else None)
    costs = replace(
        request.costs,
        blob_bytes=3 * config.ffn * config.hidden * dtype.itemsize if expert is None else expert,
        head_bytes=config.vocab * config.hidden * dtype.itemsize if head is None else head,
        scratch_bytes=scratch,
        overhead_bytes=overhead,
        driver_bytes=driver,
        attending=attending,
    )
    return replace(request, costs=costs)


def plan(config: ModelConfig, dtype: torch.dtype, context: int, **words: Any) -> Plan:
    return make_plan(asked(config, dtype, context, **words))
