"""How a text is cut to be scored: windows of it, and chunks of these."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a text of `tokens` ids, as (start, first, end). The model sees ids[start:end], up to
    `window` of them, and its logits after ids[first:end] count. Each id but the very first is predicted once.

    >>> list(windows(10, window=6, stride=3))
    [(0, 0, 6), (3, 6, 9)]
    >>> list(windows(10, window=4, stride=4))
    [(0, 0, 4), (4, 4, 8), (8, 8, 9)]
    """
    if not 1 <= stride <= window:
        raise ValueError(f"a stride of {stride} for a window of {window}")
    inputs = tokens - 1  # nothing follows the last id
    first = 0
    for start in range(0, inputs, stride):
        end = min(start + window, inputs)
        yield start, first, end
        if end == inputs:
            return
        first = end


def chunks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut a range into as few pieces of up to `size` as possible, of about equal length. A last piece of one
    token would go through the code for decoding, which rounds differently in low precision.

    >>> list(chunks(0, 10, size=4)), list(chunks(5, 5, size=4))
    ([(0, 3), (3, 6), (6, 10)], [])
    """
    count = -(-(end - start) // size)
    return itertools.pairwise(start + (end - start) * n // max(count, 1) for n in range(count + 1))


class Piece(NamedTuple):
    """Tokens `begin` to `end` of a text, which go through the model together. `start` is their window's. If
    they are not scored, they are only seen, and their logits are not needed."""

    start: int
    begin: int
    end: int
    scored: bool


def pieces(tokens: int, window: int, stride: int, chunk: int) -> Iterator[Piece]:
    """All windows over a text, each in chunks."""
    for start, first, end in windows(tokens, window, stride):
        yield from (Piece(start, a, b, False) for a, b in chunks(start, first, chunk))
        yield from (Piece(start, a, b, True) for a, b in chunks(first, end, chunk))
