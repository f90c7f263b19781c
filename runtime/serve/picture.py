"""What changed lately, and where each expert is, for the page's picture."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.experts.places import Places
from runtime.runner import ModelRunner
from runtime.stats import Stats

SPAN = 2.0  # seconds over which rates are taken

Moments = deque[tuple[float, Stats]]


@dataclass(frozen=True)
class Rates:
    """What the counters gained lately."""

    clock: Callable[[], float] = time.monotonic
    readings: Moments = field(default_factory=deque)  # the oldest first

    @property
    def fresh(self) -> bool:
        """Whether there is a reading to compare with that is not too old."""
        return bool(self.readings) and self.clock() - self.readings[0][0] < 2 * SPAN

    def read(self, total: Stats) -> tuple[Stats, float]:
        """Take a reading. Returns what has been gained since one of about `SPAN` seconds ago, and how many
        seconds ago that was."""
        now, readings = self.clock(), self.readings
        readings.append((now, total))
        while len(readings) > 2 and now - readings[1][0] >= SPAN:
            readings.popleft()
        since, before = readings[0]
        return total - before, max(now - since, 1e-3)


def picture(runner: ModelRunner) -> Places:
    """All layers of the model. Over ranks, rank 0 has the last ones, and knows the others from what came back
    with its orders."""
    own = Places.of(runner.cache, runner.config.layers, runner.config.experts)
    return runner.company.look() + own if runner.company else own


def resident(runner: ModelRunner) -> bool:
    """Whether the devices of all ranks hold every expert for good."""
    plans = runner.company.plans.plans if runner.company else [runner.plan]
    return all(plan.resident for plan in plans)
