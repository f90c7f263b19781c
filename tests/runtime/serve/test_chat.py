"""Chats by the official client, against what the engine writes by itself."""

import json

import openai
import pytest

from runtime import Engine, SamplingParams
from tests.runtime.serve.served import Running

MESSAGES = [{"role": "user", "content": "def read_bytes(obj):"}]
GREEDY = {"temperature": 0, "max_completion_tokens": 12}


def alone(engine: Engine, messages: list[dict[str, str]], **words: object) -> tuple[str, int]:
    """The text of an answer, and how many tokens it took."""
    params = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12} | words
    ids = engine.tokenizer.encode_chat(messages)
    with engine.session() as session:
        decoder = engine.tokenizer.answer_stream(ids)
        tokens = list(session.run(ids, SamplingParams(**params), decoder))  # type: ignore[arg-type]
    return "".join(token.text for token in tokens), len(tokens)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found" and "'gpt'" in str(caught.value)


def test_an_answer(client: openai.OpenAI, demo: Engine) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, **GREEDY)
    text, count = alone(demo, MESSAGES, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        text,
        "assistant",
        "length",
    )
    prompt = len(demo.tokenizer.encode_chat(MESSAGES))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, count)
    assert answer.usage.total_tokens == prompt + count
    assert (answer.object, answer.model) == ("chat.completion", "demo")


def test_a_stream(client: openai.OpenAI, demo: Engine) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=MESSAGES, stream=True, stream_options=options, **GREEDY
        )
    )
    text, count = alone(demo, MESSAGES, temperature=0)
    *rest, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == text
    assert [chunk.choices[0].finish_reason for chunk in rest if chunk.choices[0].finish_reason] == ["length"]
    assert rest[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == count
    assert len(rest) > 3  # it did come in parts


def test_a_stream_ends_as_events_do(server: Running) -> None:
    body = {"messages": MESSAGES, "stream": True, "max_tokens": 2}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_a_seed_gives_its_text_and_several_choices_differ(client: openai.OpenAI, demo: Engine) -> None:
    def texts(**words: object) -> list[str | None]:
        answer = client.chat.completions.create(
            model="demo", messages=MESSAGES, seed=5, max_tokens=12, **words
        )  # type: ignore[call-overload]
        return [choice.message.content for choice in answer.choices]

    (first,) = texts()
    several = texts(n=3)
    assert several[0] == first == alone(demo, MESSAGES, seed=5)[0]
    assert several[2] == alone(demo, MESSAGES, seed=7)[0]
    assert len(set(several)) == 3


def test_several_choices_as_a_stream(client: openai.OpenAI, demo: Engine) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, seed=5, max_tokens=12, n=2, stream=True
    )
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: alone(demo, MESSAGES, seed=5)[0], 1: alone(demo, MESSAGES, seed=6)[0]}


def test_stop(client: openai.OpenAI, demo: Engine) -> None:
    text, _ = alone(demo, MESSAGES, temperature=0, max_new_tokens=40)
    stop = text[8:10]
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=40, stop=["no such text", stop]
    )
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logit_bias_and_the_servers_own_options(client: openai.OpenAI, demo: Engine) -> None:
    wanted = demo.tokenizer.encode("x", bos=False)[-1]
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, logit_bias={str(wanted): 100}, max_tokens=3,
        extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "ignore_eos": True},
    )  # fmt: skip
    assert answer.choices[0].message.content == "x x x"


def test_a_conversation_as_clients_send_it(client: openai.OpenAI, demo: Engine) -> None:
    """With the server's own answer in it, a list of parts, and OpenAI's new name for the system."""
    brief = "Be brief."
    messages = [{"role": "system", "content": brief}, *MESSAGES]
    first = client.chat.completions.create(model="demo", messages=messages, **GREEDY).choices[0].message
    parts = [{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]
    told = [{"role": "developer", "content": brief}, *MESSAGES, first, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="demo", messages=told, **GREEDY)  # type: ignore[arg-type]
    plain = [*messages, {"role": "assistant", "content": first.content}]
    plain += [{"role": "user", "content": "and \n\nnow?"}]
    assert answer.choices[0].message.content == alone(demo, plain, temperature=0)[0]  # type: ignore[arg-type]


def test_without_a_limit_the_context_is_the_limit(client: openai.OpenAI, demo: Engine) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x" * 460}], extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == demo.plan.context
