"""Requests that are to be refused, each with the status that it should get."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from dev.harness.judge import fault_of
from dev.harness.outcome import Wrong
from dev.harness.serving.wire import Reply, head, post, value

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
FIELDS = {"message", "type", "param", "code"}


@dataclass(frozen=True)
class Broken:
    """The bytes of a request, the statuses that fit, and a word that the message has to say."""

    request: bytes
    statuses: tuple[int, ...]
    word: str = ""


def draw_broken(chance: Random, key: str) -> Broken:
    """Any of them. `key` is one that is right."""
    kinds: tuple[Callable[[Random, str], Broken], ...] = (
        wrong_key,
        wrong_bytes,
        wrong_body,
        wrong_field,
        wrong_head,
    )
    return chance.choice(kinds)(chance, key)


def a_body(chance: Random) -> tuple[str, dict[str, Any]]:
    if chance.random() < 0.5:
        return CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    return COMPLETE, {"prompt": "x", "max_tokens": 3}


def wrong_key(chance: Random, key: str) -> Broken:
    path, body = a_body(chance)
    if chance.random() < 0.3:
        return Broken(post(path, body, None), (401,), "key")
    if chance.random() < 0.3:
        return Broken(post(path, body, None, authorization=f"Basic {key}"), (401,), "key")
    wrong = chance.choice((key[:-1], key + "x", "x" * 5000, "\xe9", key.upper(), f"{key} {key}"))
    return Broken(post(path, body, wrong), (401,), "key")


def wrong_bytes(chance: Random, key: str) -> Broken:
    """A body that is no JSON object."""
    path, body = a_body(chance)
    whole = json.dumps(body).encode()
    wrong = (
        b"", whole[: chance.randint(0, len(whole) - 1)], b"[" * 100_000, b"\xff" + whole, b"[]", b"null",
        b'"x"', whole.replace(b"3", b"NaN"), whole.replace(b"3", b"1e999"), whole.replace(b"3", b"9" * 5000),
        whole + b"}", b'{"a":' * 5000 + b"1" + b"}" * 5000, bytes(chance.randrange(256) for _ in range(200)),
    )  # fmt: skip
    return Broken(post(path, chance.choice(wrong), key), (400,))


def wrong_body(chance: Random, key: str) -> Broken:
    """A value that does not fit."""
    path, body = a_body(chance)
    wrong: tuple[dict[str, Any], ...] = (
        {"temperature": "hot"}, {"temperature": -1}, {"top_p": 0}, {"top_p": [1]}, {"n": 0}, {"n": 1000},
        {"n": 13}, {"n": 1.5}, {"max_tokens": -1}, {"max_tokens": 2.5}, {"max_tokens": True}, {"stop": {}},
        {"stop": [1]}, {"stop": [""]}, {"stop": ["x"] * 100}, {"seed": "1"}, {"seed": 1 << 80},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"1": 1000}}, {"logit_bias": {"99999": 1}},
        {"presence_penalty": 3}, {"frequency_penalty": None, "stream": "yes"}, {"stream_options": {}},
        {"model": 7}, {"min_p": 2}, {"top_k": -1}, {"repetition_penalty": 0}, {"user": 5},
    )  # fmt: skip
    of_chats: tuple[dict[str, Any], ...] = (
        {"messages": []}, {"messages": {}}, {"messages": None}, {"messages": [1]}, {"top_logprobs": 3},
        {"messages": [{"role": "nobody", "content": "x"}]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "x " * 3000}]}, {"max_completion_tokens": 4},
        {"logprobs": 3}, {"response_format": {"type": "xml"}}, {"messages": [{"role": [], "content": "x"}]},
    )  # fmt: skip
    of_completions: tuple[dict[str, Any], ...] = (
        {"prompt": None}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [-1]}, {"prompt": [99999]},
        {"prompt": ["x"] * 100}, {"prompt": ["x", 1]}, {"prompt": "x " * 3000}, {"prompt": [1.5]},
        {"prompt": ["x"] * 9, "n": 2}, {"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"logprobs": 99},
        {"logprobs": True}, {"json_schema": {"type": "x"}}, {"prompt": [1 << 70]},
    )  # fmt: skip
    change = chance.choice(wrong + (of_chats if path == CHAT else of_completions))
    return Broken(post(path, body | change, key), (400,))


def wrong_field(chance: Random, key: str) -> Broken:
    """A field that nobody knows, which the message has to name."""
    path, body = a_body(chance)
    name = chance.choice(("zebra", "functions", "reasoning_effort", "web_search_options", "Temperature", "é"))
    if path == CHAT and chance.random() < 0.5:
        body["messages"][0][name] = 1
    else:
        body[name] = 1
    return Broken(post(path, body, key), (400,), name)


def wrong_head(chance: Random, key: str) -> Broken:
    path, body = a_body(chance)
    host = {"host": "127.0.0.1"}
    long = {"content-type": "application/json", "content-length": "9999999"}
    wrong = (
        Broken(post(path, body | {"model": "gpt-4"}, key), (404,), "gpt-4"),
        Broken(post("/v1/nothing", body, key), (404,)),
        Broken(post(path + "/", body, key), (404,)),
        Broken(head("GET", path, key, host), (405,)),
        Broken(head("DELETE", "/v1/models", key, host), (405,)),
        Broken(post(path, body, key, **{"content-type": "text/plain"}), (415,), "application/json"),
        Broken(head("POST", path, key, host | long), (413,)),
        Broken(post(path, {"prompt": "x" * (5 << 20)}, key), (413,)),
        Broken(post(path, body, key, **{"x-large": "x" * 30_000, "x-more": "x" * 5000}), (431,), "header"),
        Broken(post(path, body, key, **{"x-large": "x" * 200_000}), (431,), "header"),
        Broken(post(path, body, key, **{f"x-{number}": "x" for number in range(5000)}), (431,), "header"),
        Broken(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", (400,)),
        Broken(b"GET / HTTP/9\r\n\r\n", (400,)),
        Broken(post(path, body, key, **{"content-length": "-1"}), (400,)),
        Broken(post(path, body, key, **{"transfer-encoding": "gzip"}), (400, 501)),
        Broken(post(path, body, key).replace(b"host: 127.0.0.1\r\n", b""), (400,)),
    )  # fmt: skip
    return chance.choice(wrong)


def check_refused(broken: Broken, reply: Reply) -> None:
    """Raises `Wrong` unless a request is refused as it should be, in OpenAI's form and in one line."""
    asked = f"{broken.request[:600]!r}"
    if reply.status not in broken.statuses:
        raise Wrong(f"status {reply.status} and not {broken.statuses}: {reply.body[:200]!r} to {asked}")
    check_form(reply, asked)
    if broken.word not in value(reply)["error"]["message"]:
        raise Wrong(f"{reply.body[:300]!r} does not say {broken.word!r}: to {asked}")


def check_form(reply: Reply, asked: str) -> None:
    """Raises `Wrong` unless an error has OpenAI's form."""
    try:
        error = value(reply)["error"]
    except (ValueError, KeyError, TypeError):
        raise Wrong(f"status {reply.status} without an error but {reply.body[:300]!r}: to {asked}") from None
    if reply.headers.get("content-type") != "application/json" or set(error) != FIELDS or not error["type"]:
        raise Wrong(f"an error in another form, {reply.body[:300]!r} {reply.headers}: to {asked}")
    if fault := fault_of(error["message"]):
        raise Wrong(f"{fault}, {reply.body[:300]!r}: to {asked}")


def check_full(reply: Reply) -> None:
    """Raises `Wrong` unless a client is told that the queue is full, and when to come again."""
    check_form(reply, "a full queue")
    wait = reply.headers.get("retry-after", "")
    if value(reply)["error"]["code"] != "queue_full" or not wait.isdecimal() or not 1 <= int(wait) <= 60:
        raise Wrong(f"a full queue is told by {reply.body[:300]!r} {reply.headers}")
