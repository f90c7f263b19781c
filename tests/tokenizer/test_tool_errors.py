"""Conversations with tools that are refused, each with one line."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from dev.harness.mutate.json_tree import mutated
from tests.tokenizer.hard_texts import random_text
from tests.tokenizer.templates import hermes, make_folder
from tests.tokenizer.tool_messages import (
    ADD,
    ANSWER,
    ID,
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

CASES = 200
DEEP = "[" * 200 + "]" * 200
NO_CONVERSATIONS: list[tuple[Any, str]] = [
    ([USER, calls(call())], "message 2 of 2 is the last, and the result of call 'a1B2c3D4e' is"),
    ([USER, calls(call()), USER], "message 3 of 3 is from 'user' where 'tool' is due; the"),
    ([USER, calls(call(), call(of="b")), result("2"), ANSWER], "message 4 of 4 is from 'assistant' where"),
    ([USER, calls(call()), result("2", "b")], "message 3 of 3 has the tool_call_id 'b'; use one of 'a1B2"),
    ([USER, calls(call()), result("2"), result("2")], "message 4 of 4 is from 'tool' where 'assistant'"),
    ([USER, result("2")], "message 2 of 2 is from 'tool' where 'assistant' is due; a tool message answers"),
    ([USER, calls(call()), result("2"), ANSWER], "message 4 of 4 is from 'assistant'; end with the user"),
    ([USER, calls(), result("2")], "message 2 of 3 has content of type NoneType"),
    ([USER, {"role": "assistant", "tool_calls": "x"}], "message 2 of 2 has tool_calls of type str"),
    ([USER, calls("x")], "call 1 of message 2 of 2 is a str"),
    ([USER, calls(call() | {"index": 0})], "call 1 of message 2 of 2 has the unknown key 'index'"),
    ([USER, calls(call() | {"type": "code"})], "call 1 of message 2 of 2 has the type 'code'"),
    ([USER, calls({"id": ID})], "call 1 of message 2 of 2 has a function of type NoneType"),
    ([USER, calls(call(), call(of=""))], "call 2 of message 2 of 2 has the id ''"),
    ([USER, calls(call(name=3))], "call 1 of message 2 of 2 has the name 3"),
    ([USER, calls(call(arguments={}))], "call 1 of message 2 of 2 has arguments of type dict; give"),
    ([USER, calls(call(arguments=DEEP))], "the arguments of call 1 of message 2 of 2: JSON of more"),
    ([USER, calls(call(arguments="[" * 10**5))], "the arguments of call 1 of message 2 of 2: JSON of more"),
    ([USER, calls(call(arguments='"\\ud800"')), result("x")], "lone surrogate"),
    ([USER, calls(call()), result(DEEP)], "the result of call 'a1B2c3D4e': JSON of more than 128 levels"),
    ([USER, calls(call()), result(None)], "message 3 of 3 has content of type NoneType"),
    ([USER, calls(call()), result("x") | {"tool_call_id": None}], "message 3 of 3 has a tool_call_id of"),
    ([USER, calls(call()), {"role": "tool", "content": "x"}], "give 'role', 'content' and 'tool_call_id'"),
    ([USER | {"tool_calls": []}], "message 1 of 1 has the keys 'content', 'role', 'tool_calls'"),
    ([{"role": "user", "content": ["x"]}], "part 1 of message 1 of 1 is a str"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "part 1 of message 1 of 1 has the type 'imag"),
    ([{"role": "user", "content": [{"type": "text"}]}], "part 1 of message 1 of 1 has the keys 'type'"),
    ([{"role": "user", "content": {"type": "text"}}], "message 1 of 1 has content of type dict"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "complaint"), NO_CONVERSATIONS)
def test_what_is_no_conversation(mixtral: dict[str, Tokenizer], messages: Messages, complaint: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(complaint)) as caught:
        mixtral["v3"].encode_chat(messages)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        ("add", "tools is a str"),
        ([ADD, "x"], "tool 2 of 2 is a str"),
        ([{"type": "web_search"}], "tool 1 of 1 has the type 'web_search'; use 'function', the only one"),
        ([{"type": "function"}], "tool 1 of 1 has a function of type NoneType"),
        ([ADD | {"cache\n": 1}], "tool 1 of 1 has the unknown key 'cache\\n'; leave it out"),
        ([tool(returns={})], "tool 1 of 1 has the unknown key 'returns'"),
        ([tool("two words")], "tool 1 of 1 has the name 'two words'; use 1 to 64"),
        ([tool("")], "tool 1 of 1 has the name ''"),
        ([tool("x" * 65)], "tool 1 of 1 has the name 'xxx"),
        ([{"function": {}}], "tool 1 of 1 has the name None"),
        ([tool(description=3)], "tool 1 of 1 has a description of type int"),
        ([tool(parameters=[])], "tool 1 of 1 has a parameters of type list"),
        ([tool(parameters={"a": {1, 2}})], "tool 1 of 1 cannot be written as JSON"),
        ([tool(parameters={"a": json.loads(DEEP)})], "tool 1 of 1: JSON of more than 128 levels"),
        ([tool(description="\ud800")], "lone surrogate"),
    ],
)
def test_what_is_no_tool(mixtral: dict[str, Tokenizer], tools: Any, complaint: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(complaint)) as caught:
        mixtral["v3"].encode_chat([USER], tools)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("style", ["v3", "template"])
def test_damaged_requests_are_refused_in_one_line(
    mixtral: dict[str, Tokenizer], style: str, tmp_path: Path
) -> None:
    ours = mixtral["v3"] if style == "v3" else Tokenizer.load(make_folder(tmp_path / "a", hermes()))
    chance = random.Random(11)
    refused = 0
    for _ in range(CASES):
        request = [random_conversation(chance, random_text), random_tools(chance, random_text)]
        messages, offered = [*mutated(request, chance, large=1 << 10), None, None][:2]
        try:
            ids = ours.encode_chat(messages, offered)
        except TokenizerError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000, str(error)
        else:
            assert ids[-1] < ours.vocab_size
    assert CASES // 4 < refused < CASES
