"""The device that a model computes on, or is only planned for."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A CPU, a GPU of this machine, or a GPU that is not here.

    What depends on the device takes a target, so that it can be worked out for a card that one might buy.
    """

    device: torch.device
    capability: tuple[int, int] | None = None  # compute capability of a GPU; None for a CPU
    present: bool = True

    @staticmethod
    def of(device: torch.device) -> "Target":
        """A device of this machine."""
        on_gpu = device.type == "cuda"
        return Target(device, torch.cuda.get_device_capability(device) if on_gpu else None)
