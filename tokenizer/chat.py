"""Conversations as the ids that Mixtral-Instruct was trained on.

Two formats exist. V1 (Mixtral-8x7B-Instruct) writes its tags as ordinary text, V3 (Mixtral-8x22B-Instruct)
has control pieces for them:

    V1   <s> [INST] Hello [/INST] Fine</s> [INST] And you? [/INST]
    V3   <s>[INST] Hello[/INST] Fine</s>[INST] And you?[/INST]

The system message has no tags of its own: with a blank line behind it, it opens a user turn. In V1 that is
the first turn. In V3 it is the last, so that it moves along as the conversation grows.

Guarantee: control ids come from here alone, never from a message's text. (In V1 the tags are text, so a user
can write them; the format has no defence against that, though `<s>` and `</s>` stay out of reach.)

Fine-tunes with a chat template of their own are written by `tokenizer.template`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from tokenizer.conversation import split_system
from tokenizer.errors import TokenizerError

BEGIN, END = "[INST]", "[/INST]"


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
    """A conversation's ids in the format that the control pieces call for; `encode` gives a text's ids."""
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
