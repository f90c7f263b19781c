"""Completions by the official client, and tokens."""

import openai
import pytest

from runtime import Engine, SamplingParams
from tests.runtime.serve.served import Running

PROMPT = "def read_bytes(obj):"


def alone(engine: Engine, prompt: str | list[int], **words: object) -> str:
    params = {"temperature": 0, "top_p": 1.0, "max_new_tokens": 16} | words
    return "".join(token.text for token in engine.generate(prompt, SamplingParams(**params)))  # type: ignore[arg-type]


def test_a_text_and_its_ids(client: openai.OpenAI, demo: Engine) -> None:
    """Without a limit there are 16 tokens, as with OpenAI."""
    by_text = client.completions.create(model="demo", prompt=PROMPT, temperature=0)
    by_ids = client.completions.create(model="demo", prompt=demo.tokenizer.encode(PROMPT), temperature=0)
    assert by_text.choices[0].text == by_ids.choices[0].text == alone(demo, PROMPT)
    assert by_text.usage is not None and by_text.usage.completion_tokens == 16
    assert by_text.choices[0].finish_reason == "length"


def test_several_prompts(client: openai.OpenAI, demo: Engine) -> None:
    prompts = [PROMPT, "import "]
    answer = client.completions.create(model="demo", prompt=prompts, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [alone(demo, prompt) for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(demo.tokenizer.encode(prompt)) for prompt in prompts)


@pytest.mark.parametrize("seed", [7, 2**63 - 1])
def test_texts_of_one_prompt_differ_and_come_again(client: openai.OpenAI, demo: Engine, seed: int) -> None:
    def texts() -> list[str]:
        answer = client.completions.create(model="demo", prompt=PROMPT, seed=seed, n=3, max_tokens=12)
        return [choice.text for choice in answer.choices]

    found = texts()
    assert len(set(found)) == 3 and texts() == found
    for text, own in zip(found, (seed, (seed + 1) % 2**63, (seed + 2) % 2**63), strict=True):
        assert text == alone(demo, PROMPT, seed=own, temperature=1, max_new_tokens=12)


def test_what_texts_of_one_prompt_share_was_not_found(client: openai.OpenAI, demo: Engine) -> None:
    """The first has computed the prompt, so it was in no KV cache before."""
    ids = [*range(700, 760)]
    for found in (0, len(ids) - 1):
        answer = client.completions.create(model="demo", prompt=ids, n=3, max_tokens=1)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == found


def test_a_stream(client: openai.OpenAI, demo: Engine) -> None:
    rows = [demo.tokenizer.encode(PROMPT), demo.tokenizer.encode("import ")]
    stream = client.completions.create(
        model="demo", prompt=rows, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    texts, usage = ["", ""], None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage or usage
    assert texts == [alone(demo, ids) for ids in rows]
    assert usage is not None and usage.completion_tokens == 32


@pytest.mark.parametrize("text", [PROMPT, "", " é🦊 "])
def test_tokens_and_back(server: Running, demo: Engine, text: str) -> None:
    ids = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert ids == demo.tokenizer.encode(text, bos=False)
    assert server.post("/detokenize", {"tokens": ids}).json() == {"content": text}


def test_tokens_with_pieces(server: Running, demo: Engine) -> None:
    body = {"content": "x = 1", "add_special": True, "with_pieces": True}
    tokens = server.post("/tokenize", body).json()["tokens"]
    assert [token["id"] for token in tokens] == demo.tokenizer.encode("x = 1")
    assert "".join(token["piece"] for token in tokens) == " x = 1"
