"""Read the `tokenizer.json` of Llama's kind, and turn it into the sentencepiece model that it stands for.

Some fine-tunes bring this file of the `tokenizers` library and no `tokenizer.model`. It lists the pieces of a
byte-pair encoding and its merges. What cannot be turned without changing an id is refused.

Guarantee: every value has the type that it claims, or a `TokenizerError` says which one has not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tokenizer.errors import TokenizerError, quoted
from tokenizer.merges import Pair, scores
from tokenizer.sentencepiece_model import BYTES, Piece, serialize
from tokenizer.settings import Prefix, Settings, numbered_tokens
from tokenizer.vocabulary import MAX_PIECES, SPACE, Kind

MAX_MERGES = 1 << 21  # ranks are exact in float32
REMEDY = "take tokenizer.model from the original checkpoint"
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
SCHEMES = {"always": Prefix.SPACELESS, "first": Prefix.FIRST, "never": Prefix.NEVER}


def turn(file: Path, data: bytes, settings: Settings) -> tuple[bytes, Settings]:
    """Return the sentencepiece model that the contents of `tokenizer.json` stand for. Return it with
    `settings`, which are those of the files beside it, and what this file adds to them.

    Raises `TokenizerError` if the file is damaged, or if no sentencepiece model gives the same ids.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: is no JSON ({quoted(str(error))}); download it again") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{file}: holds a {type(found).__name__} where an object was expected")
    listed = numbered_tokens(file, found.get("added_tokens") or [])
    taken = {token.content for token in settings.added} | {token.id for token in settings.added}
    settings = replace(
        settings,
        added=(*settings.added, *(t for t in listed if t.content not in taken and t.id not in taken)),
        names={"bos_token": BEGIN, "eos_token": END, **settings.names},
    )
    try:
        prefix = prefix_of(found)
        model = make_model(section(found, "model"), settings, prefix is not Prefix.NEVER)
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}; {REMEDY}") from None
    if splits(found) and any(SPACE in name[1:] for name in found["model"]["vocab"]):
        raise TokenizerError(f"{file}: parts words at spaces, which some pieces hold; {REMEDY}")
    return model, replace(settings, prefix=prefix)


def make_model(model: Mapping[str, object], settings: Settings, dummy_prefix: bool) -> bytes:
    """Return the sentencepiece model of the pieces and merges in `model`."""
    check_kind(model)
    names = names_of(model.get("vocab"))
    ids = {name: i for i, name in enumerate(names)}
    unknown = piece_of(model.get("unk_token") or UNKNOWN, ids)
    begin, end = (piece_of(settings.names[name], ids) for name in ("bos_token", "eos_token"))
    ranks = ranks_of(model.get("merges"), ids)
    special = {token.content for token in (*settings.added, *settings.special) if token.special}
    words = {token.content for token in settings.added} - {left + right for left, right in ranks}
    kinds = {name: Kind.USER_DEFINED for name in words} | {name: Kind.BYTE for name in BYTES}
    kinds |= dict.fromkeys(special | {begin, end}, Kind.CONTROL) | {unknown: Kind.UNKNOWN}
    if parts := {part for pair in ranks for part in pair} & (BYTES | special):
        raise TokenizerError(f"merges join {quoted(min(parts))}, which no text holds")
    known = scores((name for name in names if name not in kinds), ranks)
    pieces = [Piece(name, known.get(name, 0.0), kinds.get(name, Kind.NORMAL)) for name in names]
    return serialize(
        pieces, unk_id=ids[unknown], bos_id=ids[begin], eos_id=ids[end], dummy_prefix=dummy_prefix
    )


def piece_of(name: object, ids: Mapping[str, int]) -> str:
    if not isinstance(name, str) or name not in ids:
        raise TokenizerError(f"the vocabulary has no piece {quoted(name)}")
    return name


def check_kind(model: Mapping[str, object]) -> None:
    """Raises `TokenizerError` unless this is a byte-pair encoding that falls back to bytes, as Llama's."""
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise TokenizerError(f"the model is {quoted(model.get('type'))}, and only BPE can be read")
    if model.get("byte_fallback") is not True:
        raise TokenizerError("the model does not fall back to bytes, as Mixtral's does")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise TokenizerError(f"{name} is {quoted(model[name])}, which sentencepiece has not")


def names_of(vocab: object) -> list[str]:
    """Return the pieces in the order of their ids."""
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MAX_PIECES:
        raise TokenizerError(f"vocab is no object of up to {MAX_PIECES} pieces")
    names: list[str] = [""] * len(vocab)
    for name, i in vocab.items():
        if type(i) is not int or not 0 <= i < len(names) or names[i] or not name:
            raise TokenizerError(
                f"piece {quoted(name)} has the id {quoted(i)}, and {len(names)} pieces have one each, from 0"
            )
        names[i] = name
    return names


def ranks_of(merges: object, ids: Mapping[str, int]) -> dict[Pair, int]:
    """Return the places of the merges, each of which is a text "left right" or a list of the two."""
    if not isinstance(merges, list) or len(merges) > MAX_MERGES:
        raise TokenizerError(f"merges is no list of up to {MAX_MERGES} pairs")
    ranks: dict[Pair, int] = {}
    for place, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TokenizerError(f"merge {place} is {quoted(merge)}, and no pair")
        left, right = pair
        if left not in ids or right not in ids or left + right not in ids:
            raise TokenizerError(
                f"merge {place} of {quoted(left)} and {quoted(right)} has parts that are no pieces"
            )
        ranks[left, right] = place
    return ranks


def prefix_of(tokenizer: Mapping[str, object]) -> Prefix:
    """Return which texts begin with a space that is not theirs, as normalizer and pre-tokenizer say."""
    steps = steps_of(tokenizer, "normalizer", "normalizers")
    before = steps_of(tokenizer, "pre_tokenizer", "pretokenizers")
    for step in (*steps, *before):
        if step.get("type") == "ByteLevel":
            raise TokenizerError("a byte-level tokenizer, as Llama 3's, which cannot be read here")
        if step.get("type") != "Metaspace" and step not in (REPLACE, PREPEND):
            raise TokenizerError(f"changes text by {quoted(step)}, which sentencepiece does otherwise")
    if PREPEND in steps:
        return Prefix.EVERY
    if not before and REPLACE not in steps:
        raise TokenizerError("does not replace spaces, as sentencepiece does")
    return scheme_of(before[0]) if before else Prefix.NEVER


def scheme_of(metaspace: Mapping[str, object]) -> Prefix:
    if metaspace.get("replacement") != SPACE:
        raise TokenizerError(f"writes spaces as {quoted(metaspace.get('replacement'))}, not as U+2581")
    older = "always" if metaspace.get("add_prefix_space", True) else "never"
    scheme = metaspace.get("prepend_scheme", older)
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise TokenizerError(f"prepend_scheme is {quoted(scheme)}")
    return SCHEMES[scheme]


def splits(tokenizer: Mapping[str, object]) -> bool:
    """Tell whether text is parted at spaces before pieces are joined."""
    return any(step.get("split", True) for step in steps_of(tokenizer, "pre_tokenizer", "pretokenizers"))


def steps_of(tokenizer: Mapping[str, object], name: str, inner: str) -> list[Mapping[str, object]]:
    """Return the steps of a normalizer or pre-tokenizer, which may be one, a sequence, or null."""
    if tokenizer.get(name) is None:
        return []
    step = section(tokenizer, name)
    steps = step.get(inner) if step.get("type") == "Sequence" else [step]
    if not isinstance(steps, list) or not all(isinstance(each, dict) for each in steps):
        raise TokenizerError(f"{name} is {quoted(step)}, and no sequence of objects")
    return steps


def section(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = values.get(name)
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} is {quoted(value)}, and must be an object")
    return value
