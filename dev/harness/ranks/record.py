"""What the report says of ranks: how often what was done, how long it took, and what was printed."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dev.harness.ranks.asked import kinds_of


@dataclass
class Record:
    """What happened in all cases so far."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by a kind of kinds, and a kind
    seconds: dict[str, list[float]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def count(self, **kinds: str) -> None:
        self.counts.update(kinds.items())

    def took(self, kind: str, seconds: float) -> None:
        self.seconds.setdefault(kind, []).append(seconds)

    def figures(self) -> list[str]:
        return [*self.counted(), *table(self.seconds), *self.printed()]

    def counted(self) -> list[str]:
        found: dict[str, list[str]] = {}
        for (name, kind), count in sorted(self.counts.items(), key=lambda item: -item[1]):
            found.setdefault(name, []).append(f"{count} {kind}")
        return [f"{name}: {', '.join(kinds)}" for name, kinds in sorted(found.items())]

    def printed(self) -> list[str]:
        return [f"{count} times printed: {line}" for line, count in kinds_of(self.lines).items()]


def table(seconds: dict[str, list[float]]) -> list[str]:
    """
    >>> print("\\n".join(table({"kill -9": [0.5, 0.25, 4]})))
    seconds until all others had ended  cases  median  worst
    kill -9                                 3    0.50   4.00
    """
    if not seconds:
        return []
    title = "seconds until all others had ended"
    rows: list[Sequence[str]] = [(title, "cases", "median", "worst")]
    for kind, found in sorted(seconds.items()):
        rows.append((kind, str(len(found)), f"{statistics.median(found):.2f}", f"{max(found):.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
