"""Work that both sides do in turn, and how they compare."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dev.peers.llamacpp.sides import Side


@dataclass
class Turns:
    """The answers of both sides to one question, in pairs."""

    ours: list[dict[str, Any]] = field(default_factory=list)
    theirs: list[dict[str, Any]] = field(default_factory=list)

    def take(self, ours: Side, theirs: Side, do: str, **given: Any) -> None:
        self.ours.append(ours.ask(do, **given))
        self.theirs.append(theirs.ask(do, **given))

    def seconds(self) -> tuple[float, float]:
        """Median wall times."""
        return median(self.ours, "seconds"), median(self.theirs, "seconds")

    def compare(self, count: int) -> dict[str, float]:
        """Ratios, and the processor time of each of `count` equal parts of the work."""
        low, middle, high = quartiles(self.ratios("seconds"))
        return {
            "ratio": middle,
            "low": low,
            "high": high,
            "our_cpu_ms": median(self.ours, "cpu_seconds") / count * 1e3,
            "their_cpu_ms": median(self.theirs, "cpu_seconds") / count * 1e3,
            "cpu_ratio": statistics.median(self.ratios("cpu_seconds")),
        }

    def ratios(self, name: str) -> list[float]:
        """Their time over ours, of each turn."""
        return [theirs[name] / ours[name] for ours, theirs in zip(self.ours, self.theirs, strict=True)]


def median(answers: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(answer[name] for answer in answers)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
