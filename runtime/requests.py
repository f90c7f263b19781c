"""What can be said of a request by arithmetic: before it is served, and also before any weight is read."""

from collections.abc import Iterable

from runtime.errors import PromptTooLong, RequestError


def check_room(tokens: int, context: int, most: int) -> int:
    """How many tokens can follow a prompt of so many in a `context`, of `most` that the model was made for.

    Raises `PromptTooLong` if none can.

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
    """The remedy for a full context, after `before`; nothing if the model was made for no more."""
    return f"{before}raise --context" if context < most else ""


def check_bias(ids: Iterable[int], vocab: int) -> None:
    """Raises `RequestError` if the model does not have one of the ids."""
    for i in ids:
        if i >= vocab:
            raise RequestError(f"logit_bias names token {i}, and ids end at {vocab - 1}")
