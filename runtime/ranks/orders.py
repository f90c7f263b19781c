"""What rank 0 has the other ranks do: a frame's header.

An order goes once around the ring. Each rank computes what it says with its own layers, on the rows that come
with it, and passes it on with the rows that it made. So rank 0 gets back what it sent, with the hidden states
after the other ranks' layers. The numbers of a header are these:

    kind, number, count of texts, each text's name and length, zeros, and each counter's sum over ranks
"""

from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from runtime.stats import Stats

FRONT = 3
SECONDS = "stall_seconds"  # travels in nanoseconds
NAMES = tuple(field.name for field in fields(Stats))
COUNTED = NAMES[NAMES.index("hits") :]  # by expert caches, which every rank has


class Kind(IntEnum):
    """What an order is about, and which rows come with it."""

    ROWS = 1  # more tokens of one text: ids [T, 1] at first, then hidden states [T, D]
    STEP = 2  # one more token of one text, whose logits are wanted: the same, with one row
    EACH = 3  # one more token of each of several texts: ids [N, 1] at first, then hidden states [N, D]
    COPY = 4  # the first text becomes the beginning of the second one, of that length
    FORGET = 5  # the texts' KV caches are not needed any more
    FETCH = 6  # a tensor of a text is wanted: its rows, from the rank that holds it on
    STORE = 7  # a tensor of a text: its rows, up to the rank that holds it
    LOOK = 8  # where experts are: the rows of `Places.packed`, to which each rank adds its layers'
    FAILED = 9  # a rank could not do it: its line, [characters, 1]
    END = 10  # there is nothing more to do


@dataclass(frozen=True)
class Order:
    """One order. `texts` are pairs of a text's name, which is a number, and its length before the order.

    An order about a tensor of a text has a second pair: the rank that holds it, and its index in that rank's
    `KVCache.parts`.
    """

    kind: Kind
    number: int
    texts: tuple[tuple[int, int], ...] = ()
    counted: Stats = field(default_factory=Stats)

    @staticmethod
    def length(texts: int) -> int:
        """How many numbers headers have, for orders of up to so many texts. There is room for two pairs."""
        return FRONT + 2 * max(texts, 2) + len(COUNTED)

    def packed(self, length: int) -> list[int]:
        """
        >>> order = Order(Kind.ROWS, 7, ((1, 512),), Stats(hits=5, stall_seconds=1.5))
        >>> Order.unpacked(order.packed(Order.length(4))) == order
        True
        """
        front = [self.kind, self.number, len(self.texts), *(n for text in self.texts for n in text)]
        numbers = [as_number(name, getattr(self.counted, name)) for name in COUNTED]
        return front + [0] * (length - len(front) - len(numbers)) + numbers

    @staticmethod
    def unpacked(header: list[int]) -> "Order":
        """The order of a header. Raises `ValueError` if it is none."""
        kind, number, count = header[:FRONT]
        if not 0 <= count <= (len(header) - FRONT - len(COUNTED)) // 2:
            raise ValueError(f"a header of {len(header)} numbers has no room for {count} texts")
        named = header[FRONT : FRONT + 2 * count]
        counted = Stats()
        for name, value in zip(COUNTED, header[-len(COUNTED) :], strict=True):
            setattr(counted, name, from_number(name, value))
        return Order(Kind(kind), number, tuple(zip(named[::2], named[1::2], strict=True)), counted)

    def counting(self, mine: Stats) -> "Order":
        """The same order after a rank that has counted so much since it was loaded."""
        return replace(self, counted=self.counted + mine)


def rows_of(line: str) -> Tensor:
    """A line as rows, [characters, 1] int64.

    >>> line_of(rows_of("rank 1: no"))
    'rank 1: no'
    """
    return torch.tensor([[ord(character)] for character in line], dtype=torch.int64, device="cpu")


def line_of(rows: Tensor) -> str:
    return "".join(map(chr, rows[:, 0].tolist()))


def as_number(name: str, value: float) -> int:
    return round(value * 1e9) if name == SECONDS else int(value)


def from_number(name: str, value: int) -> float:
    return value / 1e9 if name == SECONDS else value
