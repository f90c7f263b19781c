"""What a plan is made for: a model in its formats, an engine's options, a device, and the memory to use."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from model.config import ModelConfig
from model.quant.formats import Formats
from model.target import Target
from runtime.errors import OptionError
from runtime.options import EngineOptions
from runtime.planning.costs import Costs, count_weights
from runtime.planning.device import pick_dtype
from runtime.planning.memory import free_device_bytes
from runtime.units import parse_bytes

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Budget:
    """The most bytes of a memory that a plan may take (None: no limit), and what a refusal calls it."""

    bytes: int | None
    place: str


@dataclass(frozen=True)
class Budgets:
    """Budgets of the device and of the host.

    A CPU is both: everything counts against the device's budget, and the host's has no limit of its own.
    """

    device: Budget
    host: Budget

    @staticmethod
    def here(options: EngineOptions, device: torch.device) -> "Budgets":
        """What is free on this machine, or the options' limits if those are lower."""
        host = budget_here(torch.device("cpu"), "ram", options.ram)
        if device.type == "cpu":
            return Budgets(host, replace(host, bytes=None))
        return Budgets(budget_here(device, "vram", options.vram), host)

    @staticmethod
    def given(options: EngineOptions, device: torch.device) -> "Budgets":
        """The options' limits alone, for a machine that need not be there.

        Raises `OptionError` if a limit is a percentage.
        """
        host = Budget(limit("ram", options.ram), "host memory")
        if device.type == "cpu":
            return Budgets(host, replace(host, bytes=None))
        return Budgets(Budget(limit("vram", options.vram), "device memory"), host)


def budget_here(device: torch.device, option: str, wish: str | None) -> Budget:
    """What may be used of a device's memory: what is free, or the option's value `wish` if that is less."""
    free = free_device_bytes(device)
    most = limit(option, wish, free)
    if most is not None and (free is None or most < free):
        return Budget(most, f"memory on {device} under --{option} {wish}")
    return Budget(free, f"memory on {device}")


def limit(option: str, wish: str | None, free: int | None = None) -> int | None:
    """An option's value in bytes. Raises `OptionError` for a percentage if `free` bytes are not known."""
    try:
        return parse_bytes(wish, whole=free) if wish else None
    except OptionError as error:
        raise OptionError(f"{option}: {error}") from error


@dataclass(frozen=True)
class Request:
    """All that a plan depends on."""

    config: ModelConfig
    formats: Formats
    options: EngineOptions
    target: Target
    dtype: torch.dtype
    costs: Costs
    budgets: Budgets
    embeds: bool = True  # this and the next are those of a part (see `model.part`)
    heads: bool = True
    chunk: int | None = None  # prompt tokens per forward; None: as many as suit the configuration

    @staticmethod
    def make(
        config: ModelConfig,
        formats: Formats,
        options: EngineOptions,
        target: Target,
        budgets: Budgets | None = None,
        files: torch.dtype | None = None,
        embeds: bool = True,
        heads: bool = True,
    ) -> "Request":
        """Join what the caller gives with what follows from it.

        By default the budgets are `Budgets.here`, or `Budgets.given` for a hypothetical target. `files` is
        `Checkpoint.mappable`. For a part of a model, `config` is the part's, and `embeds` and `heads` say
        what else it has.

        Raises `OptionError` if an option does not fit the model or the device, and `ModelError` if a format's
        groups do not divide the model's matrices.
        """
        check(options, config, target.device)
        dtype = pick_dtype(options.dtype, target, sum(count_weights(config)), formats.quantized)
        maps = options.map and target.device.type == "cpu"
        costs = Costs.of(config, formats, dtype, target, files, maps, embeds, heads)
        total = config.layers * config.experts
        if options.berths is not None and options.berths < total and not costs.from_files:
            raise OptionError(
                f"berths is {options.berths}, and all {total} experts need one, because files do not have "
                "them as memory keeps them; quantize them (python -m tools.quantize)"
            )
        if budgets is None:
            budgets = (Budgets.here if target.present else Budgets.given)(options, target.device)
        return Request(config, formats, options, target, dtype, costs, budgets, embeds, heads)

    @property
    def context(self) -> int:
        """Tokens of KV cache."""
        return self.options.context or min(DEFAULT_CONTEXT, self.config.context)

    @property
    def experts(self) -> int:
        """Those of all layers."""
        return self.config.layers * self.config.experts

    @property
    def shared(self) -> bool:
        """Whether the device computes from host memory, so that slots and arena share one budget."""
        return self.target.device.type == "cpu"

    def changed(self, **options: Any) -> "Request":
        """The same request with other values for some options."""
        return replace(self, options=replace(self.options, **options))


def check(options: EngineOptions, config: ModelConfig, device: torch.device) -> None:
    """Raises `OptionError` if an option makes no sense for this model or device, under any budget."""
    on_cpu, A, E, slots = device.type == "cpu", config.experts_per_token, config.experts, options.slots
    if options.context is not None and options.context > config.context:
        raise OptionError(
            f"context is {options.context}, and this model was made for at most {config.context}"
        )
    if options.vram and on_cpu:
        raise OptionError(f"vram is {options.vram}, and the device is the CPU; limit it with --ram")
    if options.berths and options.offload == "never":
        raise OptionError(f"berths is {options.berths} and offload is 'never'; leave one of them out")
    if slots is None:
        return
    if not A <= slots <= E:
        raise OptionError(
            f"slots is {slots}, and must be from {A}, which a token uses, to {E}, which a layer has"
        )
    if options.offload == "never" and slots < E:
        raise OptionError(
            f"slots is {slots} and offload is 'never', which keeps all {E}; leave one of them out"
        )
