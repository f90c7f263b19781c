"""Log-probabilities, against the logits that the engine computes."""

import math

import openai
import pytest

from runtime import Engine

PROMPT = "def read_bytes(obj):"
MESSAGES = [{"role": "user", "content": PROMPT}]


def likeliest(engine: Engine, ids: list[int], count: int) -> list[tuple[int, float]]:
    """The likeliest next ids after these, with their log-probabilities."""
    top = engine.logits(ids)[-1].log_softmax(-1).topk(count)
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def test_of_a_chat(client: openai.OpenAI, demo: Engine) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    ids = demo.tokenizer.encode_chat(MESSAGES)
    for one in choice.logprobs.content:
        expected = likeliest(demo, ids, 3)
        assert [entry.logprob for entry in one.top_logprobs] == pytest.approx(
            [p for _, p in expected], abs=1e-4
        )
        assert (one.token, one.logprob) == (one.top_logprobs[0].token, one.top_logprobs[0].logprob)
        assert one.bytes == list(one.token.encode())
        ids.append(expected[0][0])
    assert len(choice.logprobs.content) == 6
    assert "".join(one.token for one in choice.logprobs.content).removeprefix(" ") == choice.message.content


def test_of_a_chats_stream(client: openai.OpenAI) -> None:
    """Each token comes with its own, also where its text is held back."""
    words = {"model": "demo", "messages": MESSAGES, "logprobs": True, "temperature": 0, "max_tokens": 9}
    whole = client.chat.completions.create(**words, stop=["zzz"]).choices[0]  # type: ignore[call-overload]
    chunks = client.chat.completions.create(**words, stop=["zzz"], stream=True)  # type: ignore[call-overload]
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    tokens = [one for part in parts if part is not None for one in part.content]
    assert tokens == whole.logprobs.content and len(tokens) == 9
    assert tokens[0].top_logprobs == []


def test_of_a_completion(client: openai.OpenAI, demo: Engine) -> None:
    words = {"model": "demo", "prompt": PROMPT, "logprobs": 2, "temperature": 0, "max_tokens": 5}
    (choice,) = client.completions.create(**words).choices  # type: ignore[call-overload]
    found = choice.logprobs
    expected = likeliest(demo, demo.tokenizer.encode(PROMPT), 2)
    assert list(found.top_logprobs[0].values()) == pytest.approx([p for _, p in expected], abs=1e-4)
    assert found.token_logprobs[0] == pytest.approx(expected[0][1], abs=1e-4)
    for token, start, end in zip(found.tokens, found.text_offset, [*found.text_offset[1:], 999], strict=True):
        assert choice.text[start:end] == token
    parts = [c.choices[0] for c in client.completions.create(**words, stream=True)]  # type: ignore[call-overload]
    assert [part.logprobs.text_offset[0] for part in parts] == found.text_offset
    assert "".join(part.text for part in parts) == choice.text


def test_none_is_asked_for_with_zero(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, logprobs=0, max_tokens=1, temperature=0)
    found = answer.choices[0].logprobs
    assert found is not None and found.top_logprobs == [{}] and math.isfinite(found.token_logprobs[0])  # type: ignore


def test_penalties_change_the_text(client: openai.OpenAI) -> None:
    def text(**words: float) -> str:
        answer = client.completions.create(
            model="demo", prompt="x x x x x x", temperature=0, max_tokens=24, **words
        )  # type: ignore[call-overload]
        return str(answer.choices[0].text)

    plain = text()
    assert text(presence_penalty=0.0) == plain
    assert len({plain, text(presence_penalty=2.0), text(frequency_penalty=2.0)}) == 3
