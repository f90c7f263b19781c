"""The tokenizer of a folder as two generations of llama.cpp's converters put it into a GGUF header."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from tests.tools.quantize.sources.gguf_writer import Token, tokens_of
from tokenizer.vocabulary import Kind


def config_of(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def pieces_of(folder: Path) -> list[Token]:
    """The pieces of a sentencepiece model as sentencepiece tells them."""
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def kind(i: int) -> Kind:
        tests = {Kind.UNKNOWN: model.is_unknown, Kind.CONTROL: model.is_control, Kind.BYTE: model.is_byte}
        return next((kind for kind, test in tests.items() if test(i)), Kind.NORMAL)

    return [(model.id_to_piece(i), model.get_score(i), kind(i)) for i in range(model.vocab_size())]


def added_of(folder: Path) -> list[tuple[int, str, bool]]:
    """Every added token that the configuration declares: its id, its text, and whether it is special."""
    declared = config_of(folder).get("added_tokens_decoder", {})
    return [(int(i), token["content"], token["special"]) for i, token in declared.items()]


def today(folder: Path, vocab: int) -> list[Token]:
    """Special tokens are control ones, also the unknown one. Ids without a token are unused ones."""
    tokens = pieces_of(folder)
    tokens += [(f"[PAD{i}]", -10000.0, Kind.UNUSED) for i in range(len(tokens), vocab)]
    for i, text, special in added_of(folder):
        looks_special = text.startswith("<|") and text.endswith("|>")
        tokens[i] = text, -1000.0, Kind.CONTROL if special or looks_special else Kind.USER_DEFINED
    return tokens


def at_first(folder: Path, vocab: int) -> list[Token]:
    """Added tokens are user-defined ones, and so are those that pad the vocabulary."""
    tokens = pieces_of(folder)
    tokens += [
        (text, -1000.0, Kind.USER_DEFINED) for i, text, _ in sorted(added_of(folder)) if i >= len(tokens)
    ]
    tokens += [(f"<dummy{n:05d}>", -1000.0, Kind.USER_DEFINED) for n in range(1, vocab - len(tokens) + 1)]
    return tokens


def without_scores(folder: Path) -> list[Token]:
    """From tokenizer.json, which has no scores: all pieces get the same."""
    return [(text, -1000.0, kind) for text, _, kind in pieces_of(folder)]


CONVERTERS: Mapping[str, Callable[[Path, int], list[Token]]] = {
    "today": today,
    "at first": at_first,
}


def keys_of(folder: Path, vocab: int, converter: str) -> dict[str, Any]:
    """The keys of the tokenizer in a folder, for a model of `vocab` ids."""
    tokens, config = CONVERTERS[converter](folder, vocab), config_of(folder)
    ids = {text: i for i, (text, _, _) in enumerate(tokens)}
    eos = ids[config.get("eos_token") or "</s>"]
    template = config.get("chat_template")
    return tokens_of(tokens, eos_token_id=eos) | ({"tokenizer.chat_template": template} if template else {})
