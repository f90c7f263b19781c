"""What a conversation is, in any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from tokenizer.errors import TokenizerError, quoted

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def check_conversation(messages: Sequence[Mapping[str, object]]) -> list[Message]:
    """Return the messages of a conversation that waits for an answer.

    Raises `TokenizerError` if the roles are not (system,) user, assistant, user, ..., user, or if a message
    is not plain text.
    """
    checked = [_check(message, i, len(messages)) for i, message in enumerate(messages)]
    first = 1 if checked and checked[0]["role"] == "system" else 0
    if len(checked) == first:
        raise TokenizerError(f"the conversation of {len(messages)} messages has no user message; add one")
    for i, turn in enumerate(checked[first:]):
        expected = "assistant" if i % 2 else "user"
        if turn["role"] != expected:
            raise TokenizerError(
                f"message {first + i + 1} of {len(messages)} is from {turn['role']!r} where {expected!r} "
                "is due; after an optional first system message, user and assistant take turns"
            )
    if checked[-1]["role"] == "assistant":
        raise TokenizerError(
            f"message {len(messages)} of {len(messages)} is from 'assistant'; "
            "end with the user message to be answered"
        )
    return checked


def split_system(messages: Sequence[Mapping[str, object]]) -> tuple[str, list[Message]]:
    """Check a conversation. Return its system text ("" if there is none) and its turns.

    >>> split_system([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    ('Be brief.', [{'role': 'user', 'content': 'Hi'}])

    Raises `TokenizerError` as `check_conversation` does.
    """
    turns = check_conversation(messages)
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    return system, turns


def _check(message: Mapping[str, object], index: int, count: int) -> Message:
    """Return the message as a `Message`. Raises `TokenizerError`, with its place, if it is none."""
    where = f"message {index + 1} of {count}"
    if not isinstance(message, Mapping):
        raise TokenizerError(f"{where} is a {type(message).__name__}; give a dict with 'role' and 'content'")
    if set(message) != {"role", "content"}:
        keys = ", ".join(quoted(key) for key in sorted(map(str, message))[:4]) or "none"
        raise TokenizerError(f"{where} has the keys {keys}; give 'role' and 'content' and nothing else")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise TokenizerError(f"{where} has the role {quoted(role)}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise TokenizerError(f"{where} has content of type {type(content).__name__}; give it as one str")
    return {"role": role, "content": content}  # type: ignore[typeddict-item]
