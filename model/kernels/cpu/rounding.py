"""How activations are rounded to integers of 8 bits.

A row is cut into units: the groups of the weights, or 64 activations where groups are longer. A unit has one
scale d, by which its largest value becomes `top`:

    q = round(x * (top / largest))    d = largest / top    x is about d * q

Users choose weights of 8 bits to lose little, and 8-bit activations would lose as much again. So there q has
two planes of 7 bits, q = 128 * high + low, which costs a second product for each weight. High values stay
within 63 and low ones within 64: then the products of two neighbours add up to 16 bits, as AVX2 needs.

The rows are stored as the kernels read them. Up to `TILE` rows are a tile. In a tile, four activations of
the first row are followed by the same four of the second, and so on. The last rows make tiles of 4, 2 and 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from model.quant.spec import QuantSpec

TILE = 8  # rows of activations that are multiplied at a time
UNIT = 64


@dataclass(frozen=True)
class Scheme:
    """A format of weights, as far as kernels depend on it when they are compiled."""

    LOW_BITS: ClassVar[int] = 7

    bits: int
    group: int

    @staticmethod
    def of(spec: QuantSpec) -> "Scheme":
        return Scheme(spec.bits, spec.group_size)

    @property
    def unit(self) -> int:
        """Activations that share a scale."""
        return min(self.group, UNIT)

    @property
    def planes(self) -> int:
        return 2 if self.bits == 8 else 1

    @property
    def top(self) -> int:
        """The largest integer that an activation becomes."""
        return 63 * 128 + 63 if self.planes == 2 else 127
