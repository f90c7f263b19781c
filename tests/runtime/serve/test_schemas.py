"""Random JSON schemas over HTTP, several at once: every answer parses and fits."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

import pytest
from jsonschema import Draft202012Validator

from tests.runtime.schemas import random_schema
from tests.runtime.serve.served import Running

MESSAGES = [{"role": "user", "content": "x"}]


def answered(server: Running, bias: dict[str, float], seed: int) -> bool:
    """Whether the answer to a request with a random schema ended by itself. It has to fit in any case."""
    chance = Random(seed)
    schema = random_schema(chance)
    body = {
        "messages": MESSAGES,
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
        "temperature": chance.choice((0, 0.3, 1, 2)),
        "top_p": chance.choice((1, 0.9)),
        "seed": seed,
        "logit_bias": bias,
    }
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop", (seed, choice)
    value = json.loads(choice["message"]["content"])
    Draft202012Validator(schema).validate(value)  # without formats: Python knows no year 0, and RFC 3339 does
    return True


@pytest.mark.parametrize("count", [6, pytest.param(500, marks=pytest.mark.slow)])
def test_random_schemas(server: Running, count: int) -> None:
    """What ends a value is made likelier, so that texts end before the context does."""
    pieces = server.served.engine.tokenizer.vocabulary.decoded
    short = [i for i, piece in enumerate(pieces) if isinstance(piece, str) and len(piece) < 3]
    bias = {str(i): 60.0 for i in short if set(str(pieces[i])) & set('"]},')}
    bias |= {str(i): -60.0 for i in short if set(str(pieces[i])) & set("0123456789")}
    bias[str(server.served.engine.tokenizer.eos_id)] = 60.0
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(partial(answered, server, bias), range(count))) == count
