"""Conversations as the ids that Mixtral-Instruct was trained on.

There are two formats. V1 (Mixtral-8x7B-Instruct) writes its tags as ordinary text. V3
(Mixtral-8x22B-Instruct) has control pieces for them:

    V1   <s> [INST] Hello [/INST] Fine</s> [INST] And you? [/INST]
    V3   <s>[INST] Hello[/INST] Fine</s>[INST] And you?[/INST]

The system message has no tags of its own. It opens a user turn, and a blank line follows it. In V1 that is
the first turn. In V3 it is the last user turn, so the system message moves along as the conversation grows.

V3 also writes tools, before the last user turn, calls of them, and what they gave, all as JSON:

    [AVAILABLE_TOOLS] [{"type": ...}][/AVAILABLE_TOOLS][INST] Rain?[/INST][TOOL_CALLS] [{"name": ...}]</s>
    [TOOL_RESULTS] {"content": "none", "call_id": ...}[/TOOL_RESULTS]

Guarantee: control ids come from this module alone, never from a message's text. In V1 the tags are text, so a
user can write them. The format has no defense against that, but no user can write `<s>` and `</s>`.

`tokenizer.template` writes conversations for fine-tunes that bring a chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from tokenizer.conversation import Turn, split_system
from tokenizer.errors import TokenizerError, quoted
from tokenizer.json_values import read_json, write_json
from tokenizer.tool_messages import for_mistral
from tokenizer.tools import Call

BEGIN, END = "[INST]", "[/INST]"
TOOLS, END_TOOLS = "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"
CALLS = "[TOOL_CALLS]"
RESULT, END_RESULT = "[TOOL_RESULTS]", "[/TOOL_RESULTS]"


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


def takes_tools(control: Mapping[str, int]) -> bool:
    """Tell whether the format of a vocabulary's control pieces has tools."""
    due = {BEGIN, END, TOOLS, END_TOOLS, CALLS, RESULT, END_RESULT}
    return due <= control.keys() and "[SYSTEM_PROMPT]" not in control


def encode_chat(
    turns: Sequence[Turn],
    tools: Sequence[Mapping[str, Any]],
    encode: Callable[[str], list[int]],
    control: Mapping[str, int],
    bos: int,
    eos: int,
) -> list[int]:
    """Return a conversation's ids, in the format that the names and ids in `control` call for.

    `encode` gives the ids of a text. If there are tools or calls of them, `control` has to take tools. Raises
    `TokenizerError` if the format is later than V3.
    """
    version = chat_version(control)
    system, turns = split_system(turns)
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if system:
        carrier = users[0] if version is ChatVersion.V1 else users[-1]
        turns[carrier] = Turn("user", f"{system}\n\n{turns[carrier].content}")
    ids = [bos]
    for i, turn in enumerate(turns):
        if turn.role == "tool":
            ids += [control[RESULT], *encode(result_text(turn)), control[END_RESULT]]
        elif turn.role == "assistant":
            ids += [*encode_answer(turn, version, encode, control), eos]
        elif version is ChatVersion.V1:
            ids += encode(f"{BEGIN} {turn.content} {END}")
        else:
            if tools and i == users[-1]:
                ids += [control[TOOLS], *encode(write_json(for_mistral(tools))), control[END_TOOLS]]
            ids += [control[BEGIN], *encode(turn.content), control[END]]
    return ids


def encode_answer(
    turn: Turn, version: ChatVersion, encode: Callable[[str], list[int]], control: Mapping[str, int]
) -> list[int]:
    """Return the ids of what the model has said: text, or calls of tools, or one after the other.

    The reference encoder refuses text before calls. Here it stands as the model wrote it.
    """
    if version is ChatVersion.V1:
        return encode(turn.content)
    ids = encode(turn.content.rstrip(" "))  # V3 was trained on answers without trailing spaces
    if turn.calls:
        ids += [control[CALLS], *encode(calls_text(turn.calls))]
    return ids


def calls_text(calls: Sequence[Call]) -> str:
    """
    >>> calls_text([Call("now", '{"zone": "UTC"}', "x12345678")])
    '[{"name": "now", "arguments": {"zone": "UTC"}, "id": "x12345678"}]'
    """
    return write_json(
        [
            {"name": call.name, "arguments": read_json(call.arguments, "arguments"), "id": call.id}
            for call in calls
        ]
    )


def result_text(turn: Turn) -> str:
    """
    >>> result_text(Turn("tool", "[1, 2]", answers="x12345678"))
    '{"content": [1, 2], "call_id": "x12345678"}'
    """
    result = read_json(turn.content, f"the result of call {quoted(turn.answers)}")
    return write_json({"content": result, "call_id": turn.answers})
