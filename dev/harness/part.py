"""What the command knows of a part."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import Protocol, runtime_checkable

from dev.harness.outcome import Verdict
from dev.harness.subject import Subject

Case = Callable[[Random], Verdict]  # raises errors for the harness to judge


@runtime_checkable
class Telling(Protocol):
    """A case that also measures. The report has its figures, a line each."""

    def figures(self) -> list[str]: ...


class Absent(Exception):
    """Raised by opening a part that this version or this machine cannot run."""


@dataclass(frozen=True)
class Part:
    """One way to break things, and the limits of a case."""

    name: str
    open: Callable[[Subject], AbstractContextManager[Case]]
    cpu_seconds: float = 5.0  # more counts as a hang: a file may claim much, but nothing here is large
    patience: float = 60.0  # seconds of silence after which the process counts as hanging
    memory: int = 256 << 20  # bytes; more counts as a leak, because a claim was believed
    growth: int = 64 << 20  # bytes, over all cases but the first
