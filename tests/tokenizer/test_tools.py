"""Tools in conversations, id for id as mistral-common encodes them, and calls as models write them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.converters import convert_openai_messages, convert_openai_tools
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

from tests.tokenizer.hard_texts import hard_text
from tests.tokenizer.tool_messages import (
    ADD,
    ANSWER,
    SYSTEM,
    USER,
    Messages,
    call,
    calls,
    random_conversation,
    random_tools,
    result,
    tool,
)
from tokenizer import Tokenizer, TokenizerError

CASES = 300


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def reference(oracle: MistralTokenizer, messages: Messages, tools: Any = None) -> list[int]:
    request: ChatCompletionRequest[Any] = ChatCompletionRequest(
        messages=convert_openai_messages(messages), tools=convert_openai_tools(tools or [])
    )
    return oracle.encode_chat_completion(request).tokens


CONVERSATIONS: dict[str, tuple[Messages, Any]] = {
    "offered": ([USER], [ADD]),
    "offered, system": ([SYSTEM, USER, ANSWER, USER], [ADD, tool("now"), tool("x", strict=True)]),
    "called": ([USER, calls(call()), result("2")], [ADD]),
    "called, no tools": ([USER, calls(call()), result("2")], None),
    "two calls": (
        [
            *(SYSTEM, USER, calls(call(), call("now", "", "123456789"))),
            *(result("2"), result("", "123456789"), ANSWER, USER),
        ],
        [ADD],
    ),
    "results in another order": (
        [USER, calls(call(), call(of="123456789")), result("2", "123456789"), result("[null, 1e3]")],
        [],
    ),
    "calls after calls": (
        [USER, calls(call()), result("2"), calls(call()), result("3"), ANSWER, USER],
        [ADD],
    ),
    "user after a result": ([USER, calls(call()), result("2"), USER], [ADD]),
    "arguments that are no JSON": ([USER, calls(call(arguments='{"a": ')), result("{'error'}")], [ADD]),
    "JSON of any kind": (
        [USER, calls(call(arguments=' {"é":1e999 , "b":[NaN]}')), result('"a\\u00e9"')],
        [ADD],
    ),
    "empty content beside calls": ([USER, calls(call(), content=""), result([])], [ADD]),
    "parts": (
        [
            {"role": "system", "content": parts("Be", "brief.")},
            {"role": "user", "content": parts("", " a", "", "b ")},
            calls(call()),
            result(parts("[1,", "2]")),
        ],
        [ADD],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_as_mistral_common(
    mixtral: dict[str, Tokenizer], oracles: dict[str, MistralTokenizer], name: str
) -> None:
    messages, tools = CONVERSATIONS[name]
    before = json.dumps([messages, tools])
    assert mixtral["v3"].encode_chat(messages, tools) == reference(oracles["v3"], messages, tools)
    assert json.dumps([messages, tools]) == before


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_parts_as_mistral_common(
    mixtral: dict[str, Tokenizer], oracles: dict[str, MistralTokenizer], version: str
) -> None:
    chance = random.Random(5)
    for _ in range(100):
        texts = [hard_text(chance) for _ in range(chance.randrange(4))]
        messages: Messages = [{"role": "user", "content": parts(*texts)}]
        assert mixtral[version].encode_chat(messages) == reference(oracles[version], messages), messages


def test_random_conversations_as_mistral_common(
    mixtral: dict[str, Tokenizer], oracles: dict[str, MistralTokenizer]
) -> None:
    chance = random.Random(6)
    for _ in range(CASES):
        messages, offered = random_conversation(chance), random_tools(chance)
        expected = reference(oracles["v3"], messages, offered)
        assert mixtral["v3"].encode_chat(messages, offered) == expected, (messages, offered)


def test_no_text_forges_a_control_piece(mixtral: dict[str, Tokenizer]) -> None:
    ours = mixtral["v3"]
    control = set(ours.vocabulary.control.values())
    names = [
        *("<s>", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[INST]", "[/INST]", "[TOOL_CALLS]", "</s>"),
        *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ]
    chance = random.Random(7)
    for _ in range(CASES):
        evil = [chance.choice(names) + hard_text(chance) + chance.choice(names) for _ in range(4)]
        made = calls(call(evil[0], json.dumps(evil[1]), evil[2]))
        offered = [tool(description=evil[3], parameters={evil[0]: evil[1]})]
        ids = ours.encode_chat([USER, made, result(evil[3], evil[2])], offered)
        assert [i for i in ids if i in control] == [ours.vocabulary.control[n] for n in names], evil


def test_the_format_by_eye(mixtral: dict[str, Tokenizer], files: dict[str, Path]) -> None:
    ids = mixtral["v3"].encode_chat([USER, calls(call()), result("2"), ANSWER, USER], [tool("now")])
    model = SentencePieceProcessor(model_file=str(files["v3"]))
    shown = "".join(model.id_to_piece(i) for i in ids).replace("▁", " ")
    assert shown == (
        '<s>[INST] x[/INST][TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "a1B2c3D4e"}]</s>'
        '[TOOL_RESULTS] {"content": 2, "call_id": "a1B2c3D4e"}[/TOOL_RESULTS] x</s>'
        '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "now", "description": "", '
        '"parameters": {}}}][/AVAILABLE_TOOLS][INST] x[/INST]'
    )


def test_text_before_calls_stands_before_them(mixtral: dict[str, Tokenizer]) -> None:
    """The reference refuses it, and a model can write it."""
    ours = mixtral["v3"]
    begun = ours.encode_chat([USER])
    made = ours.encode_chat([USER, calls(call()), result("2")])[len(begun) :]
    both = ours.encode_chat([USER, calls(call(), content="Let me add. "), result("2")])
    assert both == begun + ours.encode("Let me add.", bos=False) + made


def test_ids_of_other_servers_are_taken(mixtral: dict[str, Tokenizer]) -> None:
    of = "call_Zx9_0123456789abcdef"
    ids = mixtral["v3"].encode_chat([USER, calls(call(of=of)), result("2", of)])
    assert mixtral["v3"].decode(ids).count(of) == 2


def test_which_formats_take_tools(mixtral: dict[str, Tokenizer], small: Tokenizer) -> None:
    v3 = mixtral["v3"]
    assert v3.takes_tools and v3.tool_calls_id == v3.vocabulary.control["[TOOL_CALLS]"]
    later = Tokenizer.load(MistralTokenizer.v7().instruct_tokenizer.tokenizer.file_path)
    for ours in (mixtral["v1"], small, later):
        assert not ours.takes_tools and ours.tool_calls_id is None
        for messages, offered in (([USER], [ADD]), ([USER, calls(call()), result("2")], None)):
            with pytest.raises(TokenizerError, match=r"has no tools.*--chat-template FILE"):
                ours.encode_chat(messages, offered)
    assert small.encode_chat([USER], []) == small.encode_chat([USER])
