"""The device that a model computes on, or is only planned for."""

from dataclasses import dataclass

import torch

TURING = (7, 5)  # the first compute capability that our kernels are for
AMPERE = (8, 0)  # the first with bfloat16 and flash attention, and where Triton uses tensor cores


@dataclass(frozen=True)
class Target:
    """A CPU, a GPU of this machine, or a hypothetical GPU.

    What depends on the device takes a target, so that it can be worked out for a card that one might buy.
    """

    device: torch.device
    capability: tuple[int, int] | None = None  # compute capability; None on a CPU, or if there is no such GPU
    present: bool = True

    @staticmethod
    def of(device: torch.device) -> "Target":
        """A device of this machine."""
        on_gpu = device.type == "cuda" and torch.cuda.is_available()
        return Target(device, torch.cuda.get_device_capability(device) if on_gpu else None)

    @staticmethod
    def hypothetical(capability: tuple[int, int] = AMPERE) -> "Target":
        """A GPU that need not be in this machine.

        >>> Target.hypothetical()
        Target(device=device(type='cuda'), capability=(8, 0), present=False)
        """
        return Target(torch.device("cuda"), capability, present=False)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"
