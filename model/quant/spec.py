"""A weight format, as users write it: `4`, `3g128`, `16`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import ModelError, quoted

DEFAULTS = {  # bits: (group size, scales per step)
    16: (0, 0),
    8: (64, 256),  # like 4 bits, so that a model that takes one takes the other
    4: (64, 256),  # this and the next two are those of arXiv 2312.17238
    3: (64, 128),
    2: (16, 128),
}
MIN_GROUP, MAX_GROUP = 16, 4096
ROWS = 16  # of a block: a quantized matrix is whole blocks
COLUMNS = 32  # it has a multiple of these, so that every plane of every row is whole words


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix [N, K] is stored: in `bits` per weight, and in groups of `group_size` weights along a row.

    Each group has an 8-bit scale and an 8-bit zero. `meta_group_size` consecutive scales of a row share a
    step. The last step of a row may serve fewer. With 16 bits there are no groups.

    A size of 0 means the default for that many bits.

    >>> QuantSpec(4)
    QuantSpec(bits=4, group_size=64, meta_group_size=256)
    >>> QuantSpec(2, group_size=64)
    QuantSpec(bits=2, group_size=64, meta_group_size=128)
    """

    bits: int
    group_size: int = 0
    meta_group_size: int = 0

    def __post_init__(self) -> None:
        if self.bits not in DEFAULTS:
            raise ModelError(f"{self.bits} bits per weight are not supported; choose 16, 8, 4, 3 or 2")
        if self.bits == 16:
            if self.group_size or self.meta_group_size:
                raise ModelError("16 bits are not quantized and have no groups; write 16 alone")
            return
        default_group, default_meta = DEFAULTS[self.bits]
        for name, what, least, default in (
            ("group_size", "group size", MIN_GROUP, default_group),
            ("meta_group_size", "number of scales per step", 1, default_meta),
        ):
            value = getattr(self, name) or default
            if not least <= value <= MAX_GROUP or value & (value - 1):
                raise ModelError(
                    f"{what} {value} is not a power of two from {least} to {MAX_GROUP}; "
                    f"the default for {self.bits} bits is {default}"
                )
            object.__setattr__(self, name, value)

    @staticmethod
    def parse(text: str) -> "QuantSpec":
        """Read `4` (with defaults), `4g128` (a group size), `4g128m64` (and scales per step), or `16`.

        >>> QuantSpec.parse("3g128"), str(QuantSpec.parse("4g64"))
        (QuantSpec(bits=3, group_size=128, meta_group_size=128), '4')
        """
        match = re.fullmatch(r"([0-9]{1,2})(?:g([1-9][0-9]{0,5}))?(?:m([1-9][0-9]{0,5}))?", text)
        if match is None:
            raise ModelError(
                f"{quoted(text)} is not a weight format: write 16, 8, 4, 3 or 2, or with a group size, "
                "as in 3g128"
            )
        return QuantSpec(*(int(part or 0) for part in match.groups()))

    def __str__(self) -> str:
        """The shortest text that `parse` reads as this."""
        group, meta = DEFAULTS[self.bits]
        return (
            f"{self.bits}"
            + f"g{self.group_size}" * (self.group_size != group)
            + f"m{self.meta_group_size}" * (self.meta_group_size != meta)
        )

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    def bits_per_weight(self, K: int) -> float:
        """All bits that a matrix of K columns is stored in, codes, scales, zeros and steps, for each weight.

        A row has a step of its own even if it has fewer groups than a step can serve.

        >>> QuantSpec(2, 64).bits_per_weight(4096)  # 64 groups, one step: 2 + (8 + 8) / 64 + 32 / 4096
        2.2578125
        >>> QuantSpec(2, 64).bits_per_weight(14336)  # 224 groups, two steps: 2 + (8 + 8) / 64 + 64 / 14336
        2.2544642857142856
        """
        if not self.quantized:
            return 16.0
        return self.bits + 16 / self.group_size + 32 * self.steps(K) / K

    def steps(self, K: int) -> int:
        """How many steps a row of K columns has."""
        return -(-K // (self.group_size * self.meta_group_size))

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises `ModelError`, naming the tensor, if this format cannot store a matrix of this shape."""
        if not self.quantized:
            return
        if len(shape) != 2 or min(shape) < 1:
            raise ModelError(f"{name}: shape {list(shape)} is not a matrix, and only matrices are quantized")
        N, K = shape
        if K % self.group_size:
            fits = K & -K  # the largest power of two that divides K
            remedy = f"use {self.bits}g{min(fits, MAX_GROUP)}" if fits >= COLUMNS else "leave it at 16 bits"
            raise ModelError(f"{name}: {K} inputs do not divide into groups of {self.group_size}; {remedy}")
        if K % COLUMNS:
            raise ModelError(f"{name}: {K} inputs are not a multiple of {COLUMNS}; leave it at 16 bits")
        if N % ROWS:
            raise ModelError(f"{name}: {N} rows are not a multiple of {ROWS}; leave it at 16 bits")
