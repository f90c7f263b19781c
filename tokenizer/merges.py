"""Turn the merges of a byte-pair encoding into the scores of the sentencepiece model that encodes alike.

Both join neighbouring pieces of a text, the best pair first, and of equal pairs the leftmost. They differ in
what makes a pair good: with merges it is the pair's place in the list, and with scores it is the score of the
piece that results, whatever its parts are. They agree all the same, under one condition.

Take two neighbours x and y at any moment of any text. No join has reached across their outer edges. So the
joins inside x + y were those that x + y alone begins with, in the same order, and x, y is a state that x + y
alone goes through. A piece P goes through one state of two parts at most, the last. So in all texts P comes
from that one pair, and the pair's place in the list gives P its score. Then all pairs that occur are in the
same order by both measures.

The condition: no P, encoded alone by the merges, may end as two parts. Scores would join them, since they
join whatever makes a piece. If P ends as three or more, no text has two parts that make P.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from tokenizer.errors import TokenizerError, quoted

Pair = tuple[str, str]
MAX_WORK = 1 << 27  # the sum of squares of the pieces' lengths, by which time grows. Mixtral's is a million


def scores(pieces: Iterable[str], ranks: Mapping[Pair, int]) -> dict[str, float]:
    """Return a score for each of these pieces. `ranks` has the places of pairs in the list of merges.

    Raises `TokenizerError` if merges leave a piece as two parts, or if pieces are so long that this would
    take minutes.

    >>> ranks = {("a", "b"): 0, ("b", "c"): 1, ("ab", "c"): 2}
    >>> scores(["a", "b", "c", "ab", "bc", "abc"], ranks)
    {'a': 0.0, 'b': 0.0, 'c': 0.0, 'ab': 0.0, 'bc': -1.0, 'abc': -2.0}
    """
    pieces, worst = list(pieces), -float(len(ranks))
    if sum(len(piece) ** 2 for piece in pieces) > MAX_WORK:
        raise TokenizerError(f"pieces have up to {max(map(len, pieces))} characters, far more than Mixtral's")
    found = {}
    for piece in pieces:
        parts, last = encode(piece, ranks)
        if len(parts) == 2:
            left, right = map(quoted, parts)
            raise TokenizerError(f"no merge joins {left} and {right}, which are a piece together")
        found[piece] = 0.0 - last if len(parts) == 1 else worst
    return found


def encode(text: str, ranks: Mapping[Pair, int]) -> tuple[list[str], int]:
    """Return the parts that merges make of a text, and the place of the last merge, 0 if there was none."""
    never = len(ranks)
    parts, last = list(text), 0
    waiting = [ranks.get(pair, never) for pair in pairwise(parts)]
    while waiting and (best := min(waiting)) < never:
        at, last = waiting.index(best), best
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del waiting[at]
        if at:
            waiting[at - 1] = ranks.get((parts[at - 1], parts[at]), never)
        if at < len(waiting):
            waiting[at] = ranks.get((parts[at], parts[at + 1]), never)
    return parts, last
