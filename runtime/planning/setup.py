"""What an engine decides before anything is allocated: device, dtype, and what goes where."""

from dataclasses import dataclass

import torch

from model.attention import Attending
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.quant.backends import fused
from model.quant.expert import ExpertFormat
from model.quant.product import scratch_bytes
from model.quant.spec import QuantSpec
from model.rows import kernel_bytes
from runtime.errors import OptionError
from runtime.loader import attention_bytes
from runtime.options import EngineOptions
from runtime.planning.device import choose_device, choose_dtype
from runtime.planning.memory import context_bytes, driver_bytes, free_device_bytes, overhead_bytes
from runtime.planning.planner import Plan, count_weights, plan
from runtime.units import parse_bytes

DEFAULT_CONTEXT = 4096
SHAPES = 5  # of matrices: qkv, o, w13, w2 and the head


@dataclass(frozen=True)
class Setup:
    """What is decided before anything is allocated."""

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    form: ExpertFormat


def make_plan(checkpoint: Checkpoint, options: EngineOptions) -> Setup:
    """What an engine with these options takes, where and in which dtype. Raises as `plan_model` does."""
    return plan_model(checkpoint.config, checkpoint.attention, checkpoint.experts, options)


def plan_model(
    config: ModelConfig, attention: QuantSpec, experts: QuantSpec, options: EngineOptions
) -> Setup:
    """The same for a model whose attention and experts have these formats.

    Raises `DeviceError` if that is more than there is, or than the options allow, `OptionError` for options
    that do not fit the model or the device.
    """
    device = choose_device(options.device)
    on_cpu, quantized = device.type == "cpu", attention.quantized or experts.quantized
    dtype = choose_dtype(options.dtype, device, sum(count_weights(config)), quantized)
    if options.context is not None and options.context > config.context:
        raise OptionError(
            f"context is {options.context}, and this model was made for at most {config.context}"
        )
    if options.vram and on_cpu:
        raise OptionError(f"vram is {options.vram}, and the device is the CPU; limit it with --ram")
    if options.link_gbps and not on_cpu:
        raise OptionError(f"link_gbps is {options.link_gbps}, and only a CPU's copies can be slowed down")
    form = ExpertFormat.choose(config, experts, dtype, device)
    host = budget(torch.device("cpu"), "--ram", options.ram)
    limit, place = host if on_cpu else budget(device, "--vram", options.vram)
    capability = None if on_cpu else torch.cuda.get_device_capability(device)
    fast = fused.unsupported(device) is None
    planned = plan(
        config,
        dtype,
        options.context or min(DEFAULT_CONTEXT, config.context),
        attention_bytes(config, attention, dtype, device),
        form.blob_bytes,
        scratch_bytes(device, max(config.hidden, config.ffn), dtype, fast) if quantized else 0,
        driver_bytes(device, context_bytes(device)),
        overhead=overhead_bytes(device, capability) + kernel_bytes(SHAPES, dtype, device),
        attending=Attending.of(config, dtype, capability),
        budget=limit,
        place=place,
        host_budget=None if on_cpu else host[0],
        host_place=host[1],
        shared=on_cpu,
        slots=options.slots,
        lookahead=options.lookahead,
        prefetch=options.prefetch,
        offload=options.offload,
    )
    return Setup(planned, device, dtype, form)


def budget(device: torch.device, flag: str, wish: str | None) -> tuple[int | None, str]:
    """How many bytes of a device may be used, if that is known, and what to call them."""
    free = free_device_bytes(device)
    limit = parse_bytes(wish, whole=free) if wish else None
    if limit is not None and (free is None or limit < free):
        return limit, f"memory on {device} under {flag} {wish}"
    return free, f"memory on {device}"
