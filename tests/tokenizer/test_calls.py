"""Calls of tools as models write them."""

from __future__ import annotations

import json
import random
import re

import pytest

from tests.tokenizer.tool_messages import USER, call, calls, random_name, random_value, result
from tokenizer import Tokenizer, TokenizerError
from tokenizer.tools import Call, new_call_id, parse_calls

DEEP = "[" * 200 + "]" * 200


def test_calls_come_back_as_they_were_encoded(mixtral: dict[str, Tokenizer]) -> None:
    """What a model would have to write for these ids is read as the same calls."""
    ours = mixtral["v3"]
    chance = random.Random(8)
    for _ in range(200):
        made = []
        for _ in range(chance.randint(1, 3)):
            arguments = json.dumps({"a": random_value(chance)}, ensure_ascii=False).replace("\u2581", "_")
            if "Infinity" not in arguments and "NaN" not in arguments:
                made.append((random_name(chance), arguments, random_name(chance, 9)))
        if not made:
            continue
        results = [result("x", of) for *_, of in made]
        ids = ours.encode_chat([USER, calls(*(call(*parts) for parts in made)), *results])
        assert ours.tool_calls_id is not None
        begin, end = ids.index(ours.tool_calls_id), ids.index(ours.eos_id)
        read = parse_calls(ours.decode(ids[begin:end]))
        assert [(c.name, json.loads(c.arguments), c.id) for c in read] == [
            (name, json.loads(arguments), of) for name, arguments, of in made
        ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"name": "f", "arguments": {"é": [1, "🦊"]}}]', [Call("f", '{"é": [1, "🦊"]}')]),
        (' [TOOL_CALLS] [{"name":"f"},{"name":"g","arguments":{}}]\n', [Call("f", "{}"), Call("g", "{}")]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}", "id": 7}', [Call("f", '{"a": 1}')]),
        ('<tool_call>{"name":"f"}</tool_call>\n<tool_call>{"name":"g"}', [Call("f", "{}"), Call("g", "{}")]),
        ('[{"name": "f", "arguments": {"a": "\\ud800"}, "id": "\\udfff"}]', [Call("f", '{"a": "\\ud800"}')]),
    ],
)
def test_calls_that_models_write(text: str, expected: list[Call]) -> None:
    assert parse_calls(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "It rains.", '[{"name": "f"}', '[{"name": "f"}] done', '["f"]', '[{"name": ""}]',
        '{"name": 3}', '{"arguments": {}}', '{"name": "f", "arguments": NaN}', '{"name": "\\ud800"}',
        '{"name": "f", "arguments": ' + DEEP + "}", "[" * 10**5, "<tool_call>" * 9, "[" + "9" * 9999 + "]",
        '{"name": "f", "arguments": [1e999]}',
    ],
)  # fmt: skip
def test_what_calls_no_tools(text: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        parse_calls(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_new_ids_are_those_of_mistral() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100 and all(re.fullmatch("[a-zA-Z0-9]{9}", i) for i in ids)
