"""What an embedding program has set for PyTorch, kept away from what an engine computes.

A program may have switched on autocast, float32 products of less precision, or another kernel of attention.
For its engine that would mean other numbers, and then other texts. So an engine computes as PyTorch does
when nothing is set, and afterwards everything is as the program has it. Gradients and devices need nothing
here: forwards run in inference mode, and every tensor is made on a device that is named.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """One of PyTorch's settings that hold for the whole process."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    plain: tuple[Any, ...]  # values that need no change; the first is what computing is done with


def attribute(owner: Any, name: str, *plain: Any) -> Setting:
    return Setting(partial(getattr, owner, name), partial(setattr, owner, name), plain)


def determinism() -> tuple[bool, bool]:
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled, enabled and torch.is_deterministic_algorithms_warn_only_enabled()


def set_determinism(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


backends = torch.backends
SETTINGS = (
    # "none" is what PyTorch begins with: it means "ieee", unless one of the two above it says otherwise
    attribute(backends.mkldnn.matmul, "fp32_precision", "ieee", "none"),  # type: ignore[attr-defined]
    attribute(backends.mkldnn, "fp32_precision", "none", "ieee"),
    attribute(backends.cuda.matmul, "fp32_precision", "ieee", "none"),
    attribute(backends, "fp32_precision", "none", "ieee"),
    attribute(backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
    attribute(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    Setting(backends.cuda.flash_sdp_enabled, backends.cuda.enable_flash_sdp, (True,)),
    Setting(backends.cuda.math_sdp_enabled, backends.cuda.enable_math_sdp, (True,)),
    Setting(backends.cuda.mem_efficient_sdp_enabled, backends.cuda.enable_mem_efficient_sdp, (True,)),
    # refuses operations, and computes others in another order
    Setting(determinism, set_determinism, ((False, False),)),
)


class Use:
    """A forward under way. An interrupt may keep its end from being told; then it is gone with its frame."""


class Plain:
    """Knows the forwards under way in the process, and undoes their changes after the last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self.undo: list[Callable[[], None]] = []

    def begin(self, use: Use) -> None:
        with self.lock:
            self.restore()
            self.uses.add(use)
            self.change()

    def end(self, use: Use) -> None:
        with self.lock:
            self.uses.discard(use)
            self.restore()

    def change(self) -> None:
        """Bring all settings to PyTorch's own."""
        for setting in SETTINGS:
            if (found := setting.read()) not in setting.plain:
                self.undo.append(partial(setting.write, found))
                setting.write(setting.plain[0])

    def restore(self) -> None:
        """Undo all changes, if nothing is under way."""
        while self.undo and not self.uses:
            self.undo.pop()()


# PyTorch has these settings once for the process, so there is one list of what relies on them.
plain = Plain()


@contextmanager
def unaffected(device: torch.device) -> Iterator[None]:
    """While inside, computing on `device` is as with PyTorch's own settings. Afterwards all are as before.

    Autocast is this thread's own. The others are the process's: while they differ from PyTorch's own, other
    threads compute with PyTorch's own as well for as long as a forward takes.
    """
    autocast = torch.is_autocast_enabled(device.type)
    use = Use()
    plain.begin(use)
    try:
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            yield
    finally:
        plain.end(use)
