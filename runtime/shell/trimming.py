"""What a conversation forgets when it no longer fits the context.

A turn that is dropped from the front moves all that follows it, so everything has to be computed again. So
turns are dropped seldom, and then many at once: until half of the context is free.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

Messages = Sequence[dict[str, str]]


def turns_to_drop(
    messages: Messages, tokens: Callable[[Messages], int], context: int, new: int
) -> tuple[int, int]:
    """How much of a conversation to forget: the number of its oldest turns, and the index in `messages` at
    which what stays begins. A system message at the front stays too, and is not counted.

    messages   user and assistant in turn, up to the user's message that waits for an answer
    tokens     the number of tokens of such a conversation
    context    the number of tokens that fit
    new        the number of tokens that an answer may have

    Nothing is dropped while there is room for an answer, or for a quarter of the context. The last turn,
    which has no answer yet, is never dropped, even if it does not fit.
    """
    first = first_turn(messages)
    starts = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"]

    def room(turn: int) -> int:
        return context - tokens([*messages[:first], *messages[starts[turn] :]])

    if len(starts) < 2 or room(0) >= min(new, context // 4):
        return 0, first
    dropped = 1 + bisect_left(range(1, len(starts) - 1), context // 2, key=room)
    return dropped, starts[dropped]


def first_turn(messages: Messages) -> int:
    """The index after the system message, if there is one."""
    return int(bool(messages) and messages[0]["role"] == "system")
