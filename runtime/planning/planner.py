"""Which experts are where, worked out before anything is allocated.

The trunk, the KV cache and the activations of one prefill chunk come first, because every token needs them.
The rest of the memory holds experts. If all of them fit, they are resident. Otherwise each layer gets as many
slots as fit, spare slots take experts that are only guessed to be needed, and an arena in host memory has a
berth for every expert, or for as many as fit. The others stay in the checkpoint's files and are read as they
are needed.
"""

import warnings
from collections.abc import Sequence

import torch

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.quant.formats import Formats
from model.target import Target
from runtime.errors import DeviceError
from runtime.options import EngineOptions
from runtime.planning.device import pick_device
from runtime.planning.offer import Offer
from runtime.planning.plan import Plan
from runtime.planning.rates import Run, with_rates
from runtime.planning.refusal import refusal
from runtime.planning.request import Request
from runtime.planning.search import best_plan, excess_bytes
from runtime.planning.sharing import JointRequest
from runtime.units import format_bytes

FOR_MISSES = ("berths", "misses", "disk_gbps", "cpu_gbps")  # options that matter only if experts are missing
EXPERTS = ".block_sparse_moe.experts."  # in the names of experts' weights


def plan_checkpoint(checkpoint: Checkpoint, options: EngineOptions) -> Plan:
    """Plan a checkpoint for this machine. Raises as `plan_model` does."""
    c = checkpoint
    plan = plan_model(c.config, c.formats, options, c.mappable)
    return with_rates(plan, expert_runs(checkpoint) if plan.tiered else ())


def plan_part(
    own: Checkpoint, whole: Checkpoint, options: EngineOptions, offers: Sequence[Offer], rank: int
) -> Plan:
    """Plan this rank's part `own` of the checkpoint `whole` for the device and the memory of its offer.

    Prompts are cut as the whole model's are, and the dtype is that of the whole model on this device. Warns
    and raises as `plan_model` does.
    """
    w = whole
    joint = JointRequest(w.config, w.formats, options, tuple(offers), w.mappable)
    request = joint.request(rank, own.config.layers)
    plan = make_plan(request)
    tell(request, plan)
    return with_rates(plan, expert_runs(own) if plan.tiered else ())


def check_fits(checkpoint: Checkpoint, options: EngineOptions) -> None:
    """Raise as `plan_checkpoint` does, without a warning and without measuring."""
    c, target = checkpoint, Target.of(pick_device(options.device))
    make_plan(Request.make(c.config, c.formats, options, target, files=c.mappable))


def expert_runs(checkpoint: Checkpoint) -> list[Run]:
    """Where the files have experts, as few long runs of bytes."""
    runs: list[Run] = []
    for piece in checkpoint.layout.pieces:  # in the order of the files and their bytes
        if EXPERTS in piece.rows.parameter:
            path, start, size = runs[-1] if runs else (None, 0, 0)
            if piece.path == path and piece.offset == start + size:
                runs[-1] = (piece.path, start, size + piece.bytes)
            else:
                runs.append((piece.path, piece.offset, piece.bytes))
    return runs


def plan_model(
    config: ModelConfig, formats: Formats, options: EngineOptions, files: torch.dtype | None = None
) -> Plan:
    """Plan a model in these formats for this machine. `files` is `Checkpoint.mappable`; by default nothing is
    mapped, and every expert needs a berth.

    Warns if the model is larger than memory, and of options that change nothing. Raises as `pick_device`,
    `Request.make` and `make_plan` do.
    """
    target = Target.of(pick_device(options.device))
    request = Request.make(config, formats, options, target, files=files)
    plan = make_plan(request)
    tell(request, plan)
    return plan


def tell(request: Request, plan: Plan) -> None:
    """Warn if the model is larger than memory, and of options that change nothing."""
    for line in (larger_than_memory(request, plan), without_effect(request.options, plan)):
        if line:
            warnings.warn(line, RuntimeWarning, stacklevel=6)  # the caller of Engine.load or Engine.plan


def without_effect(options: EngineOptions, plan: Plan) -> str | None:
    """One line if options about missing experts were given that change nothing; None if there are none.

    >>> from dataclasses import replace
    >>> sizes = (size << 20 for size in (10, 4, 6, 0, 20, 0))
    >>> plan = Plan(torch.device("cpu"), torch.float32, 4096, 2048, *sizes, (4, 4), 0, 1 << 20)
    >>> without_effect(EngineOptions(berths=9, misses="auto"), plan)
    "berths 9 and misses 'auto' change nothing, because all experts are on the device; leave them out, or add --slots N"
    >>> without_effect(EngineOptions(cpu_gbps=30), replace(plan, arena_bytes=20 << 20))
    'cpu_gbps 30.0 changes nothing, because the CPU computes no missing experts; leave it out, or add --misses auto'
    """  # noqa: E501
    given = {name: value for name in FOR_MISSES if (value := getattr(options, name)) not in (None, "copy")}
    reason, remedy = "all experts are on the device", "--slots N"
    if not plan.resident:
        given = {name: value for name, value in given.items() if name == "cpu_gbps" and plan.misses == "copy"}
        reason, remedy = "the CPU computes no missing experts", "--misses auto"
    if not given:
        return None
    listed, several = " and ".join(f"{name} {value!r}" for name, value in given.items()), len(given) > 1
    changes, them = ("change", "them") if several else ("changes", "it")
    return f"{listed} {changes} nothing, because {reason}; leave {them} out, or add {remedy}"


def larger_than_memory(request: Request, plan: Plan) -> str | None:
    """One line if a plan's mapped files do not fit memory beside what it allocates; None if they do."""
    budget, excess = request.budgets.device, excess_bytes(request, plan)
    if not excess:
        return None
    there_is = format_bytes(budget.bytes or 0)
    return (
        f"the model is {format_bytes(excess)} larger than {budget.place} ({there_is}): what the system "
        "cannot keep of its files, it reads from the disk again and again; give the model fewer bits "
        "(python -m tools.quantize), or free some memory"
    )


def make_plan(request: Request) -> Plan:
    """The plan with the most slots that fits.

    Raises `DeviceError`, with numbers and what would help, if nothing fits.

    >>> from model.shapes import MIXTRAL_8X7B
    >>> from model.quant.spec import QuantSpec
    >>> formats, card = Formats(QuantSpec(4), QuantSpec(3, 128), QuantSpec(8)), Target.hypothetical()
    >>> print(make_plan(Request.make(MIXTRAL_8X7B, formats, EngineOptions(), card)))
    19.3 GiB: trunk 1.1 GiB, experts 16.4 GiB, kv 512.0 MiB, workspace 432.5 MiB, overhead 160.0 MiB, driver 704.0 MiB; context 4096 tokens
    >>> print(make_plan(Request.make(MIXTRAL_8X7B, formats, EngineOptions(vram="12GiB"), card)))
    12.0 GiB: trunk 1.1 GiB, slots 9.1 GiB, kv 512.0 MiB, workspace 464.5 MiB, staging 77.8 MiB, overhead 160.0 MiB, driver 704.0 MiB; context 4096 tokens
    slots: 4 in 19 layers, 5 in 13; 1 spare; 65.8 MiB an expert; arena 16.4 GiB of host memory
    """  # noqa: E501
    plan = best_plan(request)
    if plan is None:
        raise DeviceError(refusal(request))
    return plan
