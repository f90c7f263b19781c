"""What is refused, by which name, in OpenAI's form."""

import json

import openai
import pytest

from runtime import Engine
from tests.runtime.serve.served import Running

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [
        (CHAT, {"audio": {}}, "audio", "unknown or unsupported field 'audio'"),
        (CHAT, {"messages": [USER | {"name": "Ann"}]}, "messages.0.name", "'messages.0.name'"),
        (CHAT, {"messages": []}, "messages", "at least 1 item"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'user'"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        (CHAT, {"messages": [USER, USER]}, None, "'assistant' is due"),
        (CHAT, {"messages": [USER, {"role": "assistant", "content": "x"}]}, None, "end with the user"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type", "'messages.0.content.0.image_url'",
        ),
        (CHAT, {"temperature": -1}, "temperature", "temperature is -1"),
        (CHAT, {"temperature": "1"}, "temperature", "number"),
        (CHAT, {"top_p": 2}, "top_p", "top_p is 2"),
        (CHAT, {"n": 0}, "n", "greater than or equal to 1"),
        (CHAT, {"n": 99}, "n", "less than or equal to 16"),
        (CHAT, {"max_tokens": 0}, "max_new_tokens", "at least 1"),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one of them"),
        (CHAT, {"logit_bias": {"99999": 1}}, None, "token 99999"),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias.x", "integer"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        (CHAT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "'stream_options.x'"),
        (CHAT, {"stop": [""]}, "stop", "not empty"),
        (CHAT, {"store": True}, "store", "False"),
        (CHAT, {"response_format": {"type": "audio"}}, "response_format.type", "json_schema"),
        (COMPLETION, {"prompt": [1, 99999]}, None, "99999"),
        (COMPLETION, {"prompt": []}, None, "empty"),
        (COMPLETION, {"prompt": [1, "x"]}, "prompt.1", "integer"),
        (COMPLETION, {"prompt": ["x"] * 9, "n": 2}, "n", "9 prompts times n 2"),
        (COMPLETION, {"echo": True}, "echo", "False"),
        (COMPLETION, {"best_of": 2}, "best_of", "1"),
        (COMPLETION, {"suffix": "x"}, "suffix", "null"),
        ("/tokenize", {"content": "x", "prompt": "y"}, "prompt", "'prompt'"),
        ("/detokenize", {"tokens": [1 << 40]}, None, "vocabulary"),
    ],
)  # fmt: skip
def test_refused_by_name(
    server: Running, path: str, change: dict[str, object], param: str | None, words: str
) -> None:
    bodies = {CHAT: {"messages": [USER]}, COMPLETION: {"prompt": "x"}, "/tokenize": {}, "/detokenize": {}}
    answer = server.post(path, bodies[path] | change)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert words in error["message"] and "\n" not in error["message"], error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff{}", b'{"prompt": NaN}', b"[" * 100_000, b'"' * 9])
def test_broken_bodies(server: Running, body: bytes) -> None:
    answer = server.post(COMPLETION, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"]


def test_another_model(server: Running) -> None:
    answer = server.post(COMPLETION, {"prompt": "x", "model": "gpt-4"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "there is no model 'gpt-4' here; the model is 'demo'",
        "type": "invalid_request_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip


def test_paths_and_methods(server: Running) -> None:
    for answer, status in ((server.get("/nothing"), 404), (server.get(CHAT), 405)):
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_long_prompt(client: openai.OpenAI, demo: Engine) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x " * 999}])
    assert caught.value.code == "context_length_exceeded"
    assert f"the context holds {demo.plan.context}" in str(caught.value)


def test_other_kinds_of_bodies(server: Running) -> None:
    """A page elsewhere may have a visitor's browser send plain text, but never JSON."""
    answer = server.post(COMPLETION, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]


MANY = 20_000


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{}] * MANY},
        {"messages": [USER] * MANY},
        {"messages": [{"role": "user", "content": [0] * MANY}]},
        {"messages": [{"role": "assistant", "tool_calls": [0] * MANY}]},
        {"tools": [0] * MANY},
        {"stop": [0] * MANY},
        {"logit_bias": {str(n): 0 for n in range(MANY)}},
        {"logit_bias": {f"x{n}": 0 for n in range(MANY)}},
        {f"x{n}": 0 for n in range(MANY)},
    ],
)
def test_a_body_of_mistakes_costs_no_more_than_another(change: dict[str, object]) -> None:
    """Of millions of mistakes, for which a body has room, pydantic would make gigabytes in a minute."""
    from pydantic import ValidationError

    from runtime.serve.errors import LISTED, refusal
    from runtime.serve.schemas import ChatRequest

    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json(json.dumps({"messages": [USER]} | change))
    listed = caught.value.error_count() <= 2
    assert listed or not any(isinstance(value, list) for value in change.values())
    assert len(refusal(caught.value).message) < 300 and (listed or str(MANY) in refusal(caught.value).message)
    assert LISTED < MANY
