"""A short run of the harness's part that asks a server; and that it sees what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from dev.harness.outcome import Wrong
from dev.harness.serving.alone import check_texts
from dev.harness.serving.asking import draw, draw_short
from dev.harness.serving.broken import COMPLETE, Broken, check_refused, draw_broken, post
from dev.harness.serving.reading import Got, read_texts
from dev.harness.serving.wire import Reply
from runtime import Engine, EngineOptions, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
JSON = {"content-type": "application/json"}


def test_a_crowd_breaks_nothing(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    words = [
        "--seed",
        "3",
        "--only",
        "server",
        "--cases",
        "8",
        "--seconds",
        "240",
        "--json",
        str(file),
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dev.harness", *words], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert file.is_file(), done.stderr
    [part] = json.loads(file.read_text())["parts"]
    assert part["findings"] == [] and part["tried"] == 8
    figures = re.match(r"(\d+) requests: (\d+) came through", part["figures"][0])
    assert figures and int(figures[1]) > 70 and int(figures[2]) > 20


# --- that it sees what is wrong


def stream(*choices: dict[str, object], done: bool = True) -> Reply:
    lines = [b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n" for choice in choices]
    body = b"".join(lines) + b"data: [DONE]\n\n" * done
    return Reply(200, {"content-type": "text/event-stream"}, body, whole=done)


def choice(text: str, finish: str | None = None, *logprobs: float) -> dict[str, object]:
    found = {"token_logprobs": list(logprobs)}
    return {"index": 0, "text": text, "finish_reason": finish, "logprobs": found}


def test_texts_are_compared_to_the_bit() -> None:
    with Engine.load(None, EngineOptions(device="cpu")) as engine:
        asked = draw_short(Random(1))
        [want] = asked.wants
        assert isinstance(want.prompt, str)
        tokens = list(engine.generate(want.prompt, want.params))
        parts = [choice(token.text, None, token.logprob) for token in tokens]
        end = choice("", "length")
        check_texts(engine, asked, read_texts(stream(*parts, end)))
        check_texts(engine, asked, read_texts(stream(*parts[:2], done=False)))
        near = choice(tokens[0].text, None, tokens[0].logprob + 1e-6)
        for wrong in (
            stream(near, *parts[1:], end),
            stream(choice("x", None, tokens[0].logprob), *parts[1:], end),
            stream(*parts[:3], end),  # too short
            stream(*parts, choice("", "stop")),
            stream(*parts),  # without an end
        ):
            with pytest.raises(Wrong):
                check_texts(engine, asked, read_texts(wrong))


def test_replies_that_end_early() -> None:
    part = stream(choice("a"), choice("b"), done=False)
    part.body = part.body[:-5]
    assert read_texts(part).texts == {0: "a"} and not read_texts(part).done
    part.whole = True
    with pytest.raises(Wrong, match="without"):
        read_texts(part)
    error = stream(done=False)
    error.body = b'data: {"error": {"message": "x"}}\n\n'
    with pytest.raises(Wrong, match="broken off"):
        read_texts(error)
    assert read_texts(Reply(200, JSON, b'{"choi')).texts == Got().texts


def test_refusals_are_judged() -> None:
    broken = Broken(post(COMPLETE, {}, None), (401,), "key")
    error = {"message": "no API key", "type": "authentication_error", "param": None, "code": None}
    good = json.dumps({"error": error}).encode()
    check_refused(broken, Reply(401, JSON, good, True))
    for status, headers, body in (
        (400, JSON, good),
        (401, {}, good),
        (401, JSON, b"Unauthorized"),
        (401, JSON, json.dumps({"error": error | {"message": "no"}}).encode()),
        (401, JSON, json.dumps({"error": error | {"message": "key\nkey"}}).encode()),
        (401, JSON, json.dumps({"error": {"message": "key"}}).encode()),
    ):
        with pytest.raises(Wrong):
            check_refused(broken, Reply(status, headers, body, True))


def test_the_same_chance_draws_the_same_requests() -> None:
    asked = [draw(Random(seed)) for seed in range(60)]
    assert asked == [draw(Random(seed)) for seed in range(60)]
    assert {each.chat for each in asked} == {True, False}
    assert any(want.params != SamplingParams() for want in asked[0].wants)
    for seed in range(60):
        assert draw_broken(Random(seed), "key") == draw_broken(Random(seed), "key")
