"""Texts that are written from random logits, and whether they fit a schema."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from jsonschema import Draft202012Validator

from runtime.answer import Answer


def written(answer: Answer, pieces: Sequence[str | int], seed: int) -> str:
    """The text that an answer becomes, which has to end by itself. Quotes, commas and brackets are likelier
    than other tokens, so that it is short. Nothing else ends it."""
    generator = torch.Generator().manual_seed(seed)
    closing = torch.zeros(len(pieces))
    for i, piece in enumerate(pieces):
        if isinstance(piece, str) and len(piece) < 3 and set(piece) & set('"]},'):
            closing[i] = 12
    text, finish = "", None
    while finish is None:
        token = answer.take(torch.randn(len(pieces), generator=generator) * 4 + closing)
        text, finish = text + token.text, token.finish
    assert finish == "eos"
    return text


def valid(text: str, schema: Any) -> None:
    checker = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    checker.validate(json.loads(text))
