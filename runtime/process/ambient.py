"""Keep an engine's results independent of what the embedding program has set for PyTorch.

A program may have switched on autocast, float32 products of lower precision, or another attention kernel. Its
engine would then compute other numbers, and generate other texts. So an engine computes with PyTorch's own
settings, and restores the program's afterwards. Gradients and default devices need nothing here, since
forwards run in inference mode and every tensor is made on a named device.
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
    plain: tuple[Any, ...]  # values that need no change; any other is replaced by the first


def attribute(owner: Any, name: str, *plain: Any) -> Setting:
    return Setting(partial(getattr, owner, name), partial(setattr, owner, name), plain)


def determinism() -> tuple[bool, bool]:
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled, enabled and torch.is_deterministic_algorithms_warn_only_enabled()


def set_determinism(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


backends = torch.backends
SETTINGS = (
    # PyTorch begins with "none", which means "ieee" unless one of the two settings above says otherwise.
    attribute(backends.mkldnn.matmul, "fp32_precision", "ieee", "none"),  # type: ignore[attr-defined]
    attribute(backends.mkldnn, "fp32_precision", "none", "ieee"),
    attribute(backends.cuda.matmul, "fp32_precision", "ieee", "none"),
    attribute(backends, "fp32_precision", "none", "ieee"),
    attribute(backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
    attribute(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    Setting(backends.cuda.flash_sdp_enabled, backends.cuda.enable_flash_sdp, (True,)),
    Setting(backends.cuda.math_sdp_enabled, backends.cuda.enable_math_sdp, (True,)),
    Setting(backends.cuda.mem_efficient_sdp_enabled, backends.cuda.enable_mem_efficient_sdp, (True,)),
    # Determinism refuses some operations, and computes others in another order.
    Setting(determinism, set_determinism, ((False, False),)),
)


class Use:
    """A running forward. It disappears with its frame if an interrupt keeps `Plain.end` from running."""


class Plain:
    """Knows the running forwards of the process, and undoes all changes after the last one."""

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
        """Give all settings PyTorch's own values."""
        for setting in SETTINGS:
            if (found := setting.read()) not in setting.plain:
                self.undo.append(partial(setting.write, found))
                setting.write(setting.plain[0])

    def restore(self) -> None:
        """Undo all changes unless a forward is running."""
        while self.undo and not self.uses:
            self.undo.pop()()


# PyTorch has these settings once per process, so there is one object that tracks their users.
plain = Plain()


@contextmanager
def default_settings(device: torch.device) -> Iterator[None]:
    """Inside, the calling thread computes on `device` with PyTorch's own settings. Afterwards the program's
    are back.

    Autocast belongs to the thread, the other settings to the process. So the program's other threads compute
    with PyTorch's own settings, too, for as long as a forward runs.
    """
    autocast = torch.is_autocast_enabled(device.type)
    use = Use()
    plain.begin(use)
    try:
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            yield
    finally:
        plain.end(use)
