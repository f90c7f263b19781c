"""Conversations as the ids that Mixtral-Instruct was trained on.

Two formats exist. V1 (Mixtral-8x7B-Instruct) writes its tags as ordinary text, V3 (Mixtral-8x22B-Instruct)
has control pieces for them:

    V1   <s> [INST] Hello [/INST] Fine</s> [INST] And you? [/INST]
    V3   <s>[INST] Hello[/INST] Fine</s>[INST] And you?[/INST]

The system message has no tags of its own: with a blank line behind it, it opens a user turn. In V1 that is
the first turn. In V3 it is the last, so that it moves along as the conversation grows.

Guarantee: control ids come from here alone, never from a message's text. (In V1 the tags are text, so a user
can write them; the format has no defence against that, though `<s>` and `</s>` stay out of reach.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Literal, TypedDict

from tokenizer.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizer.tokenizer import Tokenizer

BEGIN, END = "[INST]", "[/INST]"
ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatVersion(Enum):
    """The chat format, named as Mistral does."""

    V1 = "v1"
    V3 = "v3"


def chat_version(control: Mapping[str, int]) -> ChatVersion:
    """Tell the chat format from the vocabulary's control pieces.

    >>> chat_version({"<s>": 1, "</s>": 2}), chat_version({"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4})
    (<ChatVersion.V1: 'v1'>, <ChatVersion.V3: 'v3'>)

    Raises:
        TokenizerError: The vocabulary belongs to a later format, which places the system message elsewhere.
    """
    if "[SYSTEM_PROMPT]" in control:
        raise TokenizerError(
            f"the vocabulary has [SYSTEM_PROMPT] (id {control['[SYSTEM_PROMPT]']}), so its chat format is "
            "later than V3, which Mixtral does not use; encode the conversation's text yourself"
        )
    return ChatVersion.V3 if BEGIN in control and END in control else ChatVersion.V1


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]]) -> list[int]:
    """See `Tokenizer.encode_chat`."""
    version = tokenizer.chat_version
    system, turns = split_system(messages)
    if system:
        carrier = 0 if version is ChatVersion.V1 else len(turns) - 1
        turns[carrier] = {"role": "user", "content": f"{system}\n\n{turns[carrier]['content']}"}
    ids = [tokenizer.bos_id]
    for turn in turns:
        if turn["role"] == "user":
            ids += encode_turn(tokenizer, turn["content"])
        else:
            # V3 was trained on answers without trailing spaces
            answer = turn["content"] if version is ChatVersion.V1 else turn["content"].rstrip(" ")
            ids += [*tokenizer.encode(answer, bos=False), tokenizer.eos_id]
    return ids


def encode_turn(tokenizer: Tokenizer, content: str) -> list[int]:
    """See `Tokenizer.encode_turn`."""
    if tokenizer.chat_version is ChatVersion.V1:
        return tokenizer.encode(f"{BEGIN} {content} {END}", bos=False)
    control = tokenizer.vocabulary.control
    return [control[BEGIN], *tokenizer.encode(content, bos=False), control[END]]


def split_system(messages: Sequence[Mapping[str, object]]) -> tuple[str, list[Message]]:
    """Check a conversation; return the system text ("" if there is none) and the turns.

    >>> split_system([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    ('Be brief.', [{'role': 'user', 'content': 'Hi'}])

    Raises:
        TokenizerError: The roles do not run (system,) user, assistant, user, ..., user, or a message is not
            plain text.
    """
    checked = [_check(message, i, len(messages)) for i, message in enumerate(messages)]
    system = checked.pop(0)["content"] if checked and checked[0]["role"] == "system" else ""
    if not checked:
        raise TokenizerError(f"the conversation of {len(messages)} messages has no user message; add one")
    for i, turn in enumerate(checked):
        expected = "assistant" if i % 2 else "user"
        if turn["role"] != expected:
            where = f"message {i + 1 + len(messages) - len(checked)} of {len(messages)}"
            raise TokenizerError(
                f"{where} is from {turn['role']!r} where {expected!r} is due; "
                "after an optional first system message, user and assistant take turns"
            )
    if len(checked) % 2 == 0:
        raise TokenizerError(
            f"message {len(messages)} of {len(messages)} is from 'assistant'; "
            "end with the user message to be answered"
        )
    return system, checked


def _check(message: Mapping[str, object], index: int, count: int) -> Message:
    """Return the message as a `Message`, or raise with its place in the conversation."""
    where = f"message {index + 1} of {count}"
    if not isinstance(message, Mapping):
        raise TokenizerError(f"{where} is a {type(message).__name__}; give a dict with 'role' and 'content'")
    if set(message) != {"role", "content"}:
        keys = ", ".join(sorted(map(str, message))) or "none"
        raise TokenizerError(f"{where} has the keys {keys}; give 'role' and 'content' and nothing else")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise TokenizerError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise TokenizerError(f"{where} has content of type {type(content).__name__}; give it as one str")
    return {"role": role, "content": content}  # type: ignore[typeddict-item]
