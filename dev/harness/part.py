"""What a part tells the command about itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random

from dev.harness.outcome import Verdict
from dev.harness.subject import Subject

Case = Callable[[Random], Verdict]  # raises what it does not want to judge itself


class Absent(Exception):
    """Raised on opening a part whose object is not in this version, or not possible on this machine."""


@dataclass(frozen=True)
class Part:
    """One way to break things, and what a case of it may take."""

    name: str
    open: Callable[[Subject], AbstractContextManager[Case]]
    cpu_seconds: float = 5.0  # more is counted as a hang: whatever was claimed, nothing here is large
    patience: float = 60.0  # seconds of silence before the process is taken for hanging
    memory: int = 256 << 20  # more is counted as a leak: memory taken for a claim
    growth: int = 64 << 20  # over all cases but the first
