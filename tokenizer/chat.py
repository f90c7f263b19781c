"""Conversations as the ids that Mixtral-Instruct was trained on.

There are two formats. V1 (Mixtral-8x7B-Instruct) writes its tags as ordinary text. V3
(Mixtral-8x22B-Instruct) has control pieces for them:

    V1   <s> [INST] Hello [/INST] Fine</s> [INST] And you? [/INST]
    V3   <s>[INST] Hello[/INST] Fine</s>[INST] And you?[/INST]

The system message has no tags of its own. It opens a user turn, and a blank line follows it. In V1 that is
the first turn. In V3 it is the last turn, so the system message moves along as the conversation grows.

Guarantee: control ids come from this module alone, never from a message's text. In V1 the tags are text, so a
user can write them. The format has no defense against that, but no user can write `<s>` and `</s>`.

`tokenizer.template` writes conversations for fine-tunes that bring a chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from tokenizer.conversation import split_system
from tokenizer.errors import TokenizerError

BEGIN, END = "[INST]", "[/INST]"


class ChatVersion(Enum):
    """The chat format, by Mistral's name for it."""

    V1 = "v1"
    V3 = "v3"


def chat_version(control: Mapping[str, int]) -> ChatVersion:
    """Tell the chat format from a vocabulary's control pieces.

    >>> chat_version({"<s>": 1, "</s>": 2}), chat_version({"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4})
    (<ChatVersion.V1: 'v1'>, <ChatVersion.V3: 'v3'>)

    Raises `TokenizerError` if the vocabulary belongs to a later format, which places the system message
    elsewhere.
    """
    if "[SYSTEM_PROMPT]" in control:
        raise TokenizerError(
            f"the vocabulary has [SYSTEM_PROMPT] (id {control['[SYSTEM_PROMPT]']}), so its chat format is "
            "later than V3, which Mixtral does not use; give its template with --chat-template FILE"
        )
    return ChatVersion.V3 if BEGIN in control and END in control else ChatVersion.V1


def encode_chat(
    messages: Sequence[Mapping[str, object]],
    encode: Callable[[str], list[int]],
    control: Mapping[str, int],
    bos: int,
    eos: int,
) -> list[int]:
    """Return a conversation's ids, in the format that the names and ids in `control` call for.

    `encode` gives the ids of a text. Raises `TokenizerError` if the messages are not a conversation.
    """
    version = chat_version(control)
    system, turns = split_system(messages)
    if system:
        carrier = 0 if version is ChatVersion.V1 else len(turns) - 1
        turns[carrier] = {"role": "user", "content": f"{system}\n\n{turns[carrier]['content']}"}
    ids = [bos]
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "assistant":
            # V3 was trained on answers without trailing spaces
            ids += [*encode(content if version is ChatVersion.V1 else content.rstrip(" ")), eos]
        elif version is ChatVersion.V1:
            ids += encode(f"{BEGIN} {content} {END}")
        else:
            ids += [control[BEGIN], *encode(content), control[END]]
    return ids
