"""Commands over several ranks: all ranks run the same one, and rank 0 does what it says.

torchrun ends the other ranks with SIGTERM as soon as one has ended, so a rank that was told so has often not
yet learned why. It therefore waits a moment for the reason, which is what its user wants to read.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from types import FrameType
from typing import TYPE_CHECKING

from runtime.errors import MixtralError
from runtime.shell.command import FAILED, say

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.options import EngineOptions

MOMENT = 1.0  # seconds between SIGTERM and its effect
LAST = 3.0  # seconds between the loss of a rank and the end of a process that computes or waits for input


class Stopped(MixtralError):
    """SIGTERM has come. No request fails by that; the command ends."""


@contextmanager
def ending_together(options: EngineOptions) -> Iterator[int]:
    """Gives this process's rank. Inside, SIGTERM is a `Stopped` a moment later, and the lines of all
    ranks but 0 say whose they are. Without `distributed`, the rank is 0 and nothing differs."""
    if not options.distributed:
        yield 0
        return
    from runtime.ranks.launch import Launch

    rank = Launch.read(os.environ).rank

    def tell(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, MOMENT)

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("told to stop (SIGTERM)")

    before = signal.signal(signal.SIGTERM, tell), signal.signal(signal.SIGALRM, stop)
    if rank:
        sys.stderr = Named(sys.stderr, f"rank {rank}: ")  # until `run` has printed the last line
    try:
        yield rank
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGTERM, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


def end_when_lost(engine: Engine) -> None:
    """From now on this process ends soon after another rank is gone, even if it waits for a message, or is
    busy for long."""
    if engine.runner.company is not None:
        engine.runner.company.on_loss(end_soon)


def end_soon(line: str) -> None:
    def end() -> None:
        if threading.main_thread().is_alive():  # otherwise it has said so itself
            say(f"error: {line}")
        os._exit(FAILED)

    timer = threading.Timer(LAST, end)
    timer.daemon = True
    timer.start()


def follow(model: str | None, options: EngineOptions) -> None:
    """What a command does on every rank but 0."""
    from runtime.engine import Engine

    with Engine.load(model, options) as engine:
        end_when_lost(engine)
        engine.follow()


def say_loaded(engine: Engine) -> None:
    """Print where everything is."""
    plans = engine.rank_plans
    for line in (str(plans) if plans else f"{engine.plan.where}: {engine.plan}").splitlines():
        say(line)


def say_rank_plans(model: str | PathLike[str], options: EngineOptions) -> None:
    """Have rank 0 print the memory that all ranks' engines would take. This reads no weights."""
    from runtime.ranks.starting import plan_named_ranks

    rank, plans = plan_named_ranks(model, options)
    for line in [] if rank else str(plans).splitlines():
        say(line)


class Named:
    """A stderr whose lines begin with a name."""

    def __init__(self, stream: object, name: str) -> None:
        self.stream, self.name, self.fresh = stream, name, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self.stream.write(self.name + line if self.fresh else line)  # type: ignore[attr-defined]
            self.fresh = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)
