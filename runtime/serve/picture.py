"""Where each expert is, and what changed lately: read while other threads go on, and never waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.experts.cache import ExpertCache
from runtime.experts.residency import Residency
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


def places(cache: ExpertCache | None, layers: int, experts: int) -> list[str]:
    """Where each expert is: a text for each layer, with a letter for each expert.

    s in a slot, l on its way to one, g guessed, b in a berth of host memory, f only in its file
    """
    if cache is None:
        return ["s" * experts] * layers
    berths = cache.store.berths
    in_berths = set(berths.where) if not berths.complete else None
    rows = []
    for layer in range(layers):
        row = ["b" if in_berths is None or layer * experts + e in in_berths else "f" for e in range(experts)]
        for e in guessed(cache.residency, layer):
            row[e] = "g"
        for e, letter in in_slots(cache.residency, layer):
            row[e] = letter
        rows.append("".join(row))
    return rows


def guessed(residency: Residency, layer: int) -> list[int]:
    return [e for of, e in list(residency.spares.guesses) if of == layer]


def in_slots(residency: Residency, layer: int) -> list[tuple[int, str]]:
    """A layer's experts that have a slot, each with its letter."""
    found = []
    for expert, slot in list(residency.tables[layer].where.items()):
        ticket = residency.tickets.get(slot)
        found.append((expert, "s" if ticket is None or ticket.complete else "l"))
    return found


def last(cache: ExpertCache | None, layers: int) -> list[dict[str, list[int]]]:
    """For each layer, which experts its last forward found in slots, and which it missed."""
    latest = {} if cache is None else cache.ledger.latest
    rows = [latest.get(layer, ((), ())) for layer in range(layers)]
    return [{"hit": list(hits), "miss": list(misses)} for hits, misses in rows]
