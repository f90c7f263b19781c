"""Tools and schemas by the official client: by a system message on the demo, and by control tokens."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from runtime import Engine, EngineOptions
from runtime.answer import Token
from runtime.serve.calling import Calling, in_words, plan_calls
from tests.runtime.conftest import train_tokenizer
from tests.runtime.serve.served import running
from tokenizer.conversation import check_conversation

POINT = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/n"}, "label": {"enum": ["a", "b"]}},
    "required": ["x", "label"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "draw", "description": "Draw a point.", "parameters": POINT}},
    {"type": "function", "function": {"name": "clear", "parameters": {"type": "object", "maxProperties": 0}}},
]
MESSAGES: list[Any] = [{"role": "user", "content": "Draw."}]
WORDS: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 160}


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory, variant: Callable[..., Path]) -> Iterator[Engine]:
    """A random model whose tokenizer has all control pieces of V3."""
    file = tmp_path_factory.mktemp("tools") / "tokenizer.model"
    names = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    train_tokenizer(file, control_symbols=[*names, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"])
    options = EngineOptions(device="cpu", dtype="float32", parallel=2)
    with Engine.load(variant(tokenizer=file), options) as engine:
        yield engine


@pytest.fixture(scope="module")
def v3_client(v3: Engine) -> Iterator[openai.OpenAI]:
    with (
        running(v3) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        yield client


def check(calls: Any) -> None:
    """That calls are of tools that there are, and fit their schemas."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        assert call.id and call.type == "function"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("which", ["client", "v3_client"])
def test_a_call_that_is_required(which: str, seed: int, request: pytest.FixtureRequest) -> None:
    client: openai.OpenAI = request.getfixturevalue(which)
    words = WORDS | {"tools": TOOLS, "seed": seed, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**words, tool_choice="required")
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    check(choice.message.tool_calls)
    assert choice.message.tool_calls is not None and len(choice.message.tool_calls) == 1
    chosen = {"type": "function", "function": {"name": "draw"}}
    chunks = list(client.chat.completions.create(**words, tool_choice=chosen, stream=True))
    (made,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    check(made)
    assert made[0].function.name == "draw" and made[0].index == 0
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


@pytest.mark.parametrize("which", ["client", "v3_client"])
def test_a_conversation_with_results(which: str, request: pytest.FixtureRequest) -> None:
    """The answer goes back as the client got it, and then the result."""
    client: openai.OpenAI = request.getfixturevalue(which)
    words = WORDS | {"tools": TOOLS, "parallel_tool_calls": False}
    first = client.chat.completions.create(**words, tool_choice="required", seed=1).choices[0].message
    assert first.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in first.tool_calls]
    told = words | {"messages": [*MESSAGES, first, *results], "max_tokens": 4}
    answer = client.chat.completions.create(**told, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content


def test_a_choice_of_words_or_calls(client: openai.OpenAI) -> None:
    """With the bracket made likely there are calls, and with the bracket forbidden words."""
    bracket = client.post("../tokenize", body={"content": "["}, cast_to=object)
    ids = bracket["tokens"]  # type: ignore[index]
    words = WORDS | {"tools": TOOLS, "seed": 3, "temperature": 0.5}
    called = client.chat.completions.create(**words, logit_bias={str(i): 60 for i in ids}).choices[0]
    forbidden = {str(i): -100 for i in ids}
    spoken = client.chat.completions.create(**words | {"max_tokens": 5}, logit_bias=forbidden)
    assert spoken.choices[0].message.content and spoken.choices[0].finish_reason == "length"
    if called.finish_reason == "tool_calls":
        check(called.message.tool_calls)
    else:  # cut off: what there is is shown
        assert str(called.message.content).startswith("[")


def test_control_tokens_begin_calls(v3: Engine) -> None:
    """What comes before is words. Calls that break off, or are none, are words, too."""
    tokenizer = v3.tokenizer
    calling = plan_calls(tokenizer, MESSAGES, TOOLS, (), None)
    assert calling.begins == tokenizer.vocabulary.control["[TOOL_CALLS]"] and not calling.params
    begin = Token(calling.begins, "", 0.0)
    made = [Token(5, part, 0.0) for part in ('[{"name": "clear", ', '"arguments": {}}]')]
    words, calls = calling.read([Token(5, "Yes.", 0.0), begin, *made])
    assert (words, [call.name for call in calls]) == ("Yes.", ["clear"])
    assert calling.read([begin, made[0]]) == ('[{"name": "clear", ', [])
    assert calling.read(made) == ('[{"name": "clear", "arguments": {}}]', [])  # without the token


def test_without_tools_brackets_are_words(client: openai.OpenAI, demo: Engine) -> None:
    calling = plan_calls(demo.tokenizer, MESSAGES, [], (), None)
    text = '[{"name": "clear", "arguments": {}}]'
    assert calling.read([Token(5, text, 0.0)]) == (text, [])


def test_the_prompt_has_the_tools(v3: Engine, demo: Engine) -> None:
    by_tokens = plan_calls(v3.tokenizer, MESSAGES, TOOLS, ("draw",), None)
    assert by_tokens.prompt == [*v3.tokenizer.encode_chat(MESSAGES, TOOLS), by_tokens.begins]
    by_words = plan_calls(demo.tokenizer, MESSAGES, TOOLS, (), None)
    text = demo.tokenizer.decode(by_words.prompt)
    assert '"name": "draw"' in text and "You can call these tools" in text and "Draw." in text


def test_a_conversation_in_words() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "draw", "arguments": '{"x": 1}'}}
    other = {"id": "c2", "type": "function", "function": {"name": "clear", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": "Well:", "tool_calls": [call, other]},
        {"role": "tool", "tool_call_id": "c2", "content": "empty"},
        {"role": "tool", "tool_call_id": "c1", "content": "a point"},
        {"role": "user", "content": "Again."},
    ]
    told = in_words(check_conversation(messages), TOOLS)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\nYou can call")
    assert told[2]["content"].startswith('Well:\n[{"name": "draw", "arguments": {"x": 1}}, ')
    assert told[3]["content"] == "Result of clear: empty\n\nResult of draw: a point\n\nAgain."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["json_schema", "json_object", "own"])
def test_json(client: openai.OpenAI, kind: str, stream: bool) -> None:
    form: dict[str, Any] = {"type": "json_object"}
    if kind == "json_schema":
        form |= {"type": kind, "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    words = {"extra_body": {"json_schema": POINT}} if kind == "own" else {"response_format": form}
    words |= {"extra_body": {"logit_bias": {}}} if kind != "own" else {}
    made = client.chat.completions.create(**WORDS | {"max_tokens": 400}, seed=2, stream=stream, **words)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in made)
    else:
        assert made.choices[0].finish_reason == "stop"
        text = made.choices[0].message.content
    value = json.loads(text)
    jsonschema.validate(value, {"type": "object"} if kind == "json_object" else POINT)


def test_parsed_by_the_client(client: openai.OpenAI) -> None:
    """As its helper asks, with a class of pydantic's."""
    from pydantic import BaseModel

    class Point(BaseModel):
        x: bool
        label: bool

    answer = client.chat.completions.parse(**WORDS, response_format=Point, seed=1)
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_a_grammar_of_a_completion(client: openai.OpenAI) -> None:
    body = {"grammar": 'start: "yes" | "no, " /[a-z]{3}/'}
    answer = client.completions.create(model="demo", prompt="Well? ", max_tokens=20, seed=1, extra_body=body)
    assert re.fullmatch(r"yes|no, [a-z]{3}", answer.choices[0].text.lstrip(" "))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names no tool"),
        ({"tool_choice": "required"}, "names no tool"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"response_format": {"type": "json_schema"}}, "has no json_schema"),
        ({"json_schema": {"type": "object"}, "tools": TOOLS}, "bound the text"),
        ({"json_schema": {"type": "object"}, "grammar": "start: /a/"}, "contradict each other"),
        ({"json_schema": {"type": "nothing"}}, "json_schema: "),
        ({"grammar": "start: nothing"}, "grammar: "),
        ({"tools": [{"type": "code"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"functions": []}, "'functions'"),
        ({"messages": [*MESSAGES, {"role": "tool", "tool_call_id": "x", "content": "y"}]}, "'tool'"),
    ],
)
def test_refused(client: openai.OpenAI, change: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**WORDS | {"extra_body": change})
    assert words in str(caught.value)


def test_calls_are_told_from_words_however_they_are_cut() -> None:
    """Token by token, and all at once."""
    calling = Calling([], {}, None, False, True, None)
    for text in (
        '[{"name": "f", "arguments": {"a": [1]}}]',
        "no [calls]",
        "[no calls",
        ' [{"name": "f"}]',
        "",
    ):
        whole = calling.read([Token(5, text, 0.0)])
        assert calling.read([Token(5, letter, 0.0) for letter in text]) == whole
        assert bool(whole[1]) == text.startswith("[{")
