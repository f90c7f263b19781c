"""Where each expert is, and which the last forward chose: read while other threads go on, and never waited
for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.experts.cache import ExpertCache
from runtime.experts.residency import Residency

LETTERS = "?slgbf"
USES = ("", "hit", "miss")

Uses = dict[str, list[int]]


@dataclass(frozen=True)
class Places:
    """Of some layers, in their order.

    `places` has a text for each layer, with a letter for each expert:

        s in a slot, l on its way to one, g guessed, b in a berth of host memory, f only in its file,
        ? not known

    `last` says for each layer which experts its last forward found in slots ("hit"), and which not ("miss").
    """

    places: list[str]
    last: list[Uses]

    @staticmethod
    def of(cache: ExpertCache | None, layers: int, experts: int) -> Places:
        """Of all layers of a cache, or of as many resident ones."""
        if cache is None:
            return Places.alike("s", layers, experts)
        return Places(places(cache, layers, experts), last(cache, layers))

    @staticmethod
    def alike(letter: str, layers: int, experts: int) -> Places:
        """All experts are in the same place."""
        return Places([letter * experts] * layers, [{"hit": [], "miss": []} for _ in range(layers)])

    def __add__(self, later: Places) -> Places:
        return Places(self.places + later.places, self.last + later.last)

    def packed(self) -> Tensor:
        """As rows that ranks can send, [layers, experts] int64.

        >>> places = Places(["sb", "?f"], [{"hit": [0], "miss": [1]}, {"hit": [], "miss": []}])
        >>> places == Places.unpacked(places.packed())
        True
        """
        rows = [
            [LETTERS.index(letter) + len(LETTERS) * used(uses, e) for e, letter in enumerate(row)]
            for row, uses in zip(self.places, self.last, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    @staticmethod
    def unpacked(rows: Tensor) -> Places:
        numbers = [[divmod(number, len(LETTERS)) for number in row] for row in rows.tolist()]
        return Places(
            ["".join(LETTERS[place] for _, place in row) for row in numbers],
            [
                {name: [e for e, (use, _) in enumerate(row) if USES[use] == name] for name in USES[1:]}
                for row in numbers
            ],
        )


def used(uses: Uses, expert: int) -> int:
    return next((index for index, name in enumerate(USES) if expert in uses.get(name, ())), 0)


def places(cache: ExpertCache, layers: int, experts: int) -> list[str]:
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


def last(cache: ExpertCache, layers: int) -> list[Uses]:
    rows = [cache.ledger.latest.get(layer, ((), ())) for layer in range(layers)]
    return [{"hit": list(hits), "miss": list(misses)} for hits, misses in rows]
