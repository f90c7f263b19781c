"""Checks of a request that need no model, so a command can make them before it reads any weight."""

import operator
from collections.abc import Iterable
from typing import Any

from model.errors import quoted
from runtime.errors import PromptTooLong, RequestError


def check_room(tokens: int, context: int, most: int) -> int:
    """How many new tokens fit a `context` after a prompt of `tokens`. Raises `PromptTooLong` if none does.

    `most` is the largest context that the model was made for.

    >>> check_room(10, context=16, most=16)
    6
    """
    if tokens < context:
        return context - tokens
    raise PromptTooLong(
        f"the prompt has {tokens} tokens and the context holds {context}, with room for at least 1 new one; "
        f"shorten the prompt{more_context(' or ', context, most)}"
    )


def more_context(before: str, context: int, most: int) -> str:
    """The remedy for a full context, after `before`; empty if the model was made for no more."""
    return f"{before}raise --context" if context < most else ""


def check_bias(ids: Iterable[int], vocab: int) -> None:
    """Raises `RequestError` if one of the ids is not in the vocabulary."""
    for i in ids:
        if i >= vocab:
            raise RequestError(f"logit_bias names token {i}, and ids end at {vocab - 1}")


def check_ids(ids: Any, vocab: int) -> list[int]:
    """A prompt's ids as plain integers. Raises `RequestError` unless they are one or more of the model's."""
    try:
        items = None if isinstance(ids, bytes) else iter(ids)
    except TypeError:  # a number, or a tensor of no dimensions
        items = None
    if items is None:
        raise RequestError(f"the prompt is of type {type(ids).__name__}; give a str or token ids")
    checked = []
    for i in items:
        try:
            index = operator.index(i)
        except TypeError:  # a fraction, a word, a row of a matrix
            index = -1
        if not 0 <= index < vocab:
            raise RequestError(
                f"the prompt holds {quoted(i)}, and token ids are integers from 0 to {vocab - 1}"
            )
        checked.append(index)
    if not checked:
        raise RequestError("the prompt is empty; give at least one token")
    return checked
