"""Constrained text with the tokenizers of Mixtral-8x7B (V1) and 8x22B (V3), of 32,000 tokens and more."""

import json
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest

from runtime import SamplingParams
from runtime.answer import Answer
from runtime.constraint import Constraints
from tests.runtime.constrained import valid, written
from tests.runtime.schemas import random_schema
from tokenizer import Tokenizer
from tokenizer.tools import parse_calls

FILES = {"V1": "tokenizer.model.v1", "V3": "mistral_instruct_tokenizer_240323.model.v3"}
CONVERSATION = [{"role": "user", "content": "How is the weather in Oslo?"}]


def load(version: str, folder: Path) -> Tokenizer:
    spec = find_spec("mistral_common")
    assert spec is not None and spec.submodule_search_locations
    data = Path(spec.submodule_search_locations[0]) / "data" / FILES[version]
    file = folder / "tokenizer.model"
    file.write_bytes(data.read_bytes())
    return Tokenizer.load(file)


def write(tokenizer: Tokenizer, constraints: Constraints, ids: list[int], seed: int, **fields: object) -> str:
    """The answer to a conversation."""
    params = SamplingParams(temperature=1, seed=seed, max_new_tokens=3000, **fields)  # type: ignore[arg-type]
    decoder = tokenizer.answer_stream(ids)
    constraint = constraints.make(params, decoder, tokenizer.ends)
    answer = Answer(ids, params, decoder, 3000, tokenizer.ends, constraint)
    return written(answer, tokenizer.vocabulary.decoded, seed)


@pytest.mark.parametrize("version", FILES)
def test_random_schemas(version: str, tmp_path: Path) -> None:
    tokenizer = load(version, tmp_path)
    constraints, ids = Constraints(tokenizer.vocab_size), tokenizer.encode_chat(CONVERSATION)
    for seed in range(8):
        schema = random_schema(Random(seed))
        valid(write(tokenizer, constraints, ids, seed, json_schema=schema), schema)


def test_calls_of_tools_that_a_control_token_begins(tmp_path: Path) -> None:
    """The token is not shown, and what is shown is a list of calls."""
    tokenizer = load("V3", tmp_path)
    arguments = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}}
    arguments |= {"required": ["city"], "additionalProperties": False}
    call = {"type": "object", "properties": {"name": {"const": "weather"}, "arguments": arguments}}
    call |= {"required": ["name", "arguments"], "additionalProperties": False}
    calls = {"type": "array", "items": call, "minItems": 1, "maxItems": 2}
    grammar = f"start: <[{tokenizer.tool_calls_id}]> %json {json.dumps(calls)}"
    constraints, ids = Constraints(tokenizer.vocab_size), tokenizer.encode_chat(CONVERSATION)
    for seed in range(5):
        found = parse_calls(write(tokenizer, constraints, ids, seed, grammar=grammar))
        assert {call.name for call in found} == {"weather"} and len(found) <= 2
        for each in found:
            valid(each.arguments, arguments)
