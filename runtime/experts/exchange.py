"""What a device and the host say to each other in a token's step, where the host computes some experts.

It goes through page-locked memory that the device's kernels write and read, as the router's choice does.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from model.kernels import step
from runtime.experts.host import HostExperts, Job
from runtime.experts.store import Loan


class Exchange:
    """For each layer, x goes to the host, and the sum of the host's contributions comes back."""

    def __init__(
        self, host: HostExperts, layers: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.host, pin = host, device.type == "cuda"
        self.sum_there = torch.zeros(1, hidden, dtype=dtype, device=device)
        self.x = torch.zeros(1, hidden, dtype=dtype, device="cpu", pin_memory=pin)
        self.sums = torch.zeros(layers, 1, hidden, dtype=dtype, device="cpu", pin_memory=pin)

    def give(self, x: Tensor) -> None:  # [1, D]
        """Launch what brings x to the host."""
        step.fetch(words(x), words(self.x))

    def compute(
        self, layer: int, loans: Sequence[Loan], ids: list[int], weights: Tensor
    ) -> Callable[[], None]:
        """Have the host compute some experts for the x that has come. The other arguments are those of
        `HostExperts.begin`. The result waits until their sum is where the device will read it."""
        job = self.host.begin(loans, self.x, ids, weights) if loans else None
        return partial(self.finish, layer, job)

    def finish(self, layer: int, job: Job | None) -> None:
        if job is None:
            self.sums[layer].zero_()
        else:
            self.sums[layer].copy_(self.host.wait(job))

    def add(self, layer: int, y: Tensor) -> Tensor:  # [1, D] -> [1, D]
        """Launch what adds the host's sum for a layer to the device's."""
        step.fetch(words(self.sums[layer]), words(self.sum_there))
        return y + self.sum_there


def words(x: Tensor) -> Tensor:
    """The same memory as 32-bit integers."""
    return x.view(-1).view(torch.int32)
