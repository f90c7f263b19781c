"""The tokenizer in a GGUF header, as the files that a folder would have.

A header lists every token with a score and a kind. Those up to the last ordinary one are the sentencepiece
model. Those after it are tokens that a fine-tune has added, or padding that an exporter has made up.

A header does not tell which texts begin with the encoder's space. Like llama.cpp, this takes it that every
text between two control tokens does, as in folders whose tokenizer_config.json has "legacy": true.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from model.errors import ModelError, quoted
from tokenizer import Tokenizer, TokenizerError
from tokenizer.merges import scores
from tokenizer.model_file import NAME as MODEL
from tokenizer.sentencepiece_model import Piece, serialize
from tokenizer.settings import CONFIG
from tokenizer.tokenizer_json import ranks_of
from tokenizer.vocabulary import SPACE, Kind

KEY = "tokenizer.ggml."
REMEDY = "give another tokenizer by --tokenizer PATH"
# What exporters call the ids for which a model has weights and its tokenizer no token.
PADDING = re.compile(r"\[PAD\d+\]|<dummy\d+>")
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(path: Path, keys: Mapping[str, Any], vocab: int) -> dict[str, Path | bytes]:
    """The contents of `tokenizer.model` and `tokenizer_config.json`.

    Raises `ModelError` if the header has no tokenizer of sentencepiece's kind, or a damaged one, or more
    tokens than the `vocab` ids of the model.
    """
    kind = keys.get(KEY + "model")
    if kind != "llama":
        raise ModelError(
            f"{path}: its tokenizer is {quoted(kind)}, and only sentencepiece's ('llama') can be read; "
            f"{REMEDY}"
        )
    pieces = read_pieces(path, keys, vocab)
    base = 1 + max((i for i, p in enumerate(pieces) if p.kind in (Kind.NORMAL, Kind.BYTE)), default=-1)
    ids = {name: token_id(path, keys, key, len(pieces)) for name, key in NAMED.items()}
    try:
        files: dict[str, Path | bytes] = {
            MODEL: model_of(pieces[:base], ids, keys),
            CONFIG: json.dumps(settings_of(path, pieces, base, ids, keys), indent=2).encode() + b"\n",
        }
        check(files, vocab)
    except TokenizerError as error:
        raise ModelError(f"{path}: its tokenizer cannot be used ({error}); {REMEDY}") from None
    return files


def read_pieces(path: Path, keys: Mapping[str, Any], vocab: int) -> list[Piece]:
    """All tokens of the header. A user-defined one has spaces as they are in a text."""
    tokens = listed(path, keys, "tokens", str)
    values, kinds = listed(path, keys, "scores", float), listed(path, keys, "token_type", int)
    if not len(tokens) == len(values) == len(kinds) or len(tokens) > vocab:
        raise ModelError(
            f"{path}: {len(tokens)} tokens, {len(values)} scores and {len(kinds)} kinds of tokens, for a "
            f"model of {vocab} ids; the file is damaged"
        )
    if wrong := [kind for kind in kinds if not Kind.NORMAL <= kind <= Kind.BYTE]:
        raise ModelError(f"{path}: a token is of the unknown kind {wrong[0]}; the file is damaged")
    return [Piece(token, score, Kind(kind)) for token, score, kind in zip(tokens, values, kinds, strict=True)]


def listed(path: Path, keys: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    found = keys.get(KEY + name)
    if not isinstance(found, list) or not all(type(value) is kind for value in found):
        raise ModelError(f"{path}: {KEY}{name} is no list of {kind.__name__}; {REMEDY}")
    return found


def token_id(path: Path, keys: Mapping[str, Any], key: str, count: int) -> int | None:
    """The id that the header gives to the begin, end, unknown or padding token, if it gives one."""
    found = keys.get(f"{KEY}{key}_token_id")
    if found is not None and (type(found) is not int or not 0 <= found < count):
        raise ModelError(f"{path}: {KEY}{key}_token_id is {quoted(found)}, and there are {count} tokens")
    return found


def model_of(pieces: Sequence[Piece], ids: Mapping[str, int | None], keys: Mapping[str, Any]) -> bytes:
    """The sentencepiece model. Exporters that see the unknown piece among special tokens make it a control
    piece, and a fine-tune's end token need not be the model's.

    Raises `TokenizerError` if there is no such model.
    """
    places = {piece.text: i for i, piece in enumerate(pieces)}
    unk = next((i for i, piece in enumerate(pieces) if piece.kind is Kind.UNKNOWN), None)
    if unk is None:
        unk = places.get("<unk>", ids["unk_token"])
    made = []
    for i, (piece, score) in enumerate(zip(pieces, scores_of(pieces, keys), strict=True)):
        kind = Kind.UNKNOWN if i == unk else piece.kind
        text = piece.text.replace(" ", SPACE) if kind is Kind.USER_DEFINED else piece.text
        made.append(Piece(text, score, kind))
    bos, eos = places.get("<s>", ids["bos_token"]), places.get("</s>", ids["eos_token"])
    return serialize(
        made,
        unk_id=-1 if unk is None else unk,
        bos_id=-1 if bos is None else bos,
        eos_id=-1 if eos is None else eos,
        dummy_prefix=keys.get(KEY + "add_space_prefix") is not False,
    )


def scores_of(pieces: Sequence[Piece], keys: Mapping[str, Any]) -> list[float]:
    """The scores of these pieces. An exporter that read `tokenizer.json` has given all the same score, and
    has listed the merges, from which scores follow. The ids do not tell them: in Mixtral's model, runs of
    spaces come first and have the lowest scores.

    Raises `TokenizerError` if there are neither scores nor merges that can be used.
    """
    normal = [piece for piece in pieces if piece.kind is Kind.NORMAL]
    if len(normal) < 2 or len({piece.score for piece in normal}) > 1:
        return [piece.score for piece in pieces]
    merges = keys.get(KEY + "merges")
    if merges is None:
        raise TokenizerError(f"all {len(normal)} pieces have one score, and no merges tell which is better")
    ranks = ranks_of(merges, {piece.text: i for i, piece in enumerate(normal)})
    known = scores((piece.text for piece in normal), ranks)
    return [known.get(piece.text, piece.score) for piece in pieces]


def settings_of(
    path: Path, pieces: Sequence[Piece], base: int, ids: Mapping[str, int | None], keys: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`. The first `base` tokens are the sentencepiece model's."""
    added = {
        str(i): {"content": piece.text, "special": piece.kind is Kind.CONTROL}
        for i, piece in enumerate(pieces)
        if piece.kind is Kind.USER_DEFINED or (piece.kind is Kind.CONTROL and i >= base)
        if not PADDING.fullmatch(piece.text)
    }
    template = keys.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{path}: tokenizer.chat_template is {quoted(template)}, and must be a text")
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "added_tokens_decoder": added,
        **{name: pieces[i].text for name, i in ids.items() if i is not None},
        **({} if template is None else {"chat_template": template}),
    }


def check(files: Mapping[str, Path | bytes], vocab: int) -> None:
    """Raises `TokenizerError` unless the files make a tokenizer that runs."""
    with TemporaryDirectory() as folder:
        for name, contents in files.items():
            assert isinstance(contents, bytes)
            (Path(folder) / name).write_bytes(contents)
        try:
            Tokenizer.load(folder, vocab=vocab)
        except TokenizerError as error:
            raise TokenizerError(str(error).replace(f"{folder}/", "")) from None
