"""What a rank has: a device, and memory. Every rank tells the others, and layers are shared out accordingly.

Ranks of one machine share its memory, and ranks on one GPU share that. A size in bytes, such as `--ram
20GiB`, is what one rank may use of it. What is free, and percentages of that, are for all of them together.
"""

import dataclasses
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.target import Target
from runtime.errors import DeviceError
from runtime.options import RATES, EngineOptions
from runtime.planning.device import cpu_multiplies_bfloat16, find_device, pick_device
from runtime.planning.memory import driver_bytes, free_device_bytes, overhead_bytes
from runtime.planning.received import as_json, from_json
from runtime.planning.request import Budget, Budgets, limit

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """A memory that a rank may use, alone or with others."""

    option: str  # vram or ram
    free: int | None  # bytes; None if it is not known
    wish: str | None  # the option's value

    def most(self, ranks: int) -> int | None:
        """The bytes that one of so many ranks wants at most; None if it has no wish.

        >>> Memory("ram", 1000, "90%").most(ranks=2), Memory("ram", 1000, "4KiB").most(ranks=2)
        (450, 4096)
        """
        size = limit(self.option, self.wish, self.free)
        return size // ranks if size is not None and "%" in (self.wish or "") else size


@dataclass(frozen=True)
class Offer:
    """What a rank has, as it measured that itself or was told. Another machine can plan for it."""

    host: str  # equal for ranks of the same machine
    device: torch.device
    capability: tuple[int, int] | None  # of a GPU
    card: str  # equal for ranks of the same machine that use the same GPU; empty for a CPU
    memory: Memory  # of the device
    ram: Memory  # for a CPU the same
    bfloat16: bool = False  # whether its CPU multiplies that
    driver_bytes: int = 0  # this and the next are the terms of a GPU's plan
    overhead_bytes: int = 0
    link_gbps: float | None = None  # this and the next two are the rank's own options
    disk_gbps: float | None = None
    cpu_gbps: float | None = None

    @staticmethod
    def here(options: EngineOptions, local_rank: int, host: str) -> "Offer":
        """What this process has, as number `local_rank` of the ranks on the machine `host`.

        The device is the option's, or `cuda:local_rank`, or the CPU if there are not as many GPUs. Raises as
        `pick_device` does.
        """
        device = own_device(options, local_rank)
        target, ram = Target.of(device), Memory("ram", free_device_bytes(CPU), options.ram)
        rates = {name: getattr(options, name) for name in RATES}
        if not target.is_gpu:
            return Offer(host, device, None, "", ram, ram, cpu_multiplies_bfloat16(), **rates)
        card = str(getattr(torch.cuda.get_device_properties(device), "uuid", device))
        memory = Memory("vram", free_device_bytes(device), options.vram)
        terms = driver_bytes(target), overhead_bytes(target)
        return Offer(host, device, target.capability, card, memory, ram, False, *terms, **rates)

    @staticmethod
    def given(target: Target, vram: str | None, ram: str | None, host: str) -> "Offer":
        """What a hypothetical rank has that shares nothing with others. Raises `OptionError` if a size is a
        percentage."""
        own = Memory("ram", None, ram)
        own.most(1)
        if not target.is_gpu:
            return Offer(host, target.device, None, "", own, own, cpu_multiplies_bfloat16())
        memory = Memory("vram", None, vram)
        memory.most(1)
        terms = driver_bytes(target), overhead_bytes(target)
        return Offer(host, target.device, target.capability, host, memory, own, False, *terms)

    @property
    def target(self) -> Target:
        """The rank's device, as one that this machine need not have."""
        return Target(self.device, self.capability, present=False)

    @property
    def place(self) -> str:
        return f"{self.device} of {self.host}"

    def options(self, options: EngineOptions) -> EngineOptions:
        """The options with the rank's own rates, and without what follows from its offer."""
        rates = {name: getattr(self, name) for name in RATES}
        return dataclasses.replace(options, device=None, vram=None, ram=None, **rates)

    def as_dict(self) -> dict[str, Any]:
        """The fields, in types that JSON has."""
        made: dict[str, Any] = as_json(self)
        return made

    @staticmethod
    def from_dict(value: object) -> "Offer":
        """The offer that `as_dict` wrote. Raises `DeviceError` for anything else."""
        return from_json(Offer, value, "a rank's offer")


def own_device(options: EngineOptions, local_rank: int) -> torch.device:
    """The option's device, or the GPU of this number. If there is none that this build of torch has kernels
    for, the CPU, with a warning if there is another one."""
    if options.device is not None:
        return pick_device(options.device)
    if find_device(None).type == "cpu" or local_rank >= torch.cuda.device_count():
        return CPU
    try:
        return pick_device(f"cuda:{local_rank}")
    except DeviceError as error:
        warnings.warn(f"computing on the CPU: {error}", RuntimeWarning, stacklevel=3)
        return CPU


def share_memory(offers: Sequence[Offer]) -> list[Budgets]:
    """The memory that each rank may use, so that all together use no more than is free.

    Raises `OptionError` if a wish is a percentage of what is not known, or if ranks without any GPU are given
    a limit for one.
    """
    ram = divide([offer.ram for offer in offers], [offer.host for offer in offers], [CPU] * len(offers))
    cards = [(offer.host, offer.card or str(rank)) for rank, offer in enumerate(offers)]
    own = divide([offer.memory for offer in offers], cards, [offer.device for offer in offers])
    return [
        Budgets(own[rank], ram[rank])
        if offer.target.is_gpu
        else Budgets(ram[rank], Budget(None, ram[rank].place))
        for rank, offer in enumerate(offers)
    ]


def divide(
    memories: Sequence[Memory], owners: Sequence[Hashable], devices: Sequence[torch.device]
) -> list[Budget]:
    """A budget for each memory. Those with equal owners are the same memory, and share what is free there."""
    budgets = []
    for rank, (memory, owner) in enumerate(zip(memories, owners, strict=True)):
        group = [other for other, its in enumerate(owners) if its == owner]
        most = [memories[other].most(len(group)) for other in group]
        free = min((size for other in group if (size := memories[other].free) is not None), default=None)
        sizes = most if free is None else spread(free, most)
        size, place = sizes[group.index(rank)], f"memory on {devices[rank]}"
        if memory.wish is not None and size == most[group.index(rank)]:
            place += f" under --{memory.option} {memory.wish}"
        if len(group) > 1:
            place += f", which {len(group)} ranks share"
        budgets.append(Budget(size, place))
    return budgets


def spread(free: int, most: Sequence[int | None]) -> list[int]:
    """Share `free` bytes out evenly, but give none more than the most that it wants.

    >>> spread(32, [None, None]), spread(32, [20, 4]), spread(32, [20, 20]), spread(32, [None, None, 4])
    ([16, 16], [20, 4], [16, 16], [14, 14, 4])
    """
    given, left = [0] * len(most), len(most)
    wishes = [free if wish is None else wish for wish in most]
    for rank in sorted(range(len(most)), key=wishes.__getitem__):
        given[rank] = min(free // left, wishes[rank])
        free, left = free - given[rank], left - 1
    return given
