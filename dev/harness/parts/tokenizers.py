"""Damaged tokenizers, as `tokenizer.model` and as `tokenizer.json`. One that still loads has to encode,
decode and stream without a raw error."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from sentencepiece import SentencePieceProcessor

from dev.harness.mutate.json_tree import as_text, mutated
from dev.harness.mutate.protobuf import damaged, encoded, parse
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import Subject
from tokenizer import Tokenizer
from tokenizer.vocabulary import SPACE

TEXTS = (
    "def f(x):\n    return x", "  two  spaces ", "Zw\u00f6lf \U0001f98a", "</s>[INST] <|im_start|>", "", "\0",
)  # fmt: skip
CHAT = [{"role": "user", "content": "What is 6 times 7?"}]


@contextmanager
def open_tokenizer(subject: Subject) -> Iterator[Case]:
    folder = subject.work("tokenizer")
    data = (subject.hf / "tokenizer.model").read_bytes()
    message = parse(data)
    if encoded(message) != data:
        raise Wrong("a model that is taken apart and put together again has changed")

    listed = as_json(SentencePieceProcessor(model_proto=data))
    model, text = Tokenizer.load(subject.hf), "def f(x):\n    return x"
    (folder / "tokenizer.json").write_text(json.dumps(listed))
    if Tokenizer.load(folder / "tokenizer.json").encode(text) != model.encode(text):
        raise Wrong("the tokenizer.json of a model gives other ids")

    def case(chance: Random) -> Verdict:
        if chance.random() < 0.5:
            file = folder / "tokenizer.model"
            file.write_bytes(damaged(message, chance))
        else:
            file = folder / "tokenizer.json"
            file.write_bytes(as_text(mutated(listed, chance), chance))
        tokenizer = Tokenizer.load(file)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            if text and not all(0 <= i < tokenizer.vocab_size for i in ids):
                raise Wrong(f"{text!r} is encoded to ids that the vocabulary of {tokenizer.vocab_size} lacks")
            stream = tokenizer.stream()
            if "".join([*map(stream.push, ids), stream.flush()]) != tokenizer.decode(ids):
                raise Wrong(f"{text!r} is decoded differently piece by piece")
            if set(ids[1:]) & set(tokenizer.vocabulary.control.values()):
                raise Wrong(f"{text!r} is encoded to a control piece")
        tokenizer.encode_chat(CHAT)
        return Verdict.ACCEPTED

    yield case


def as_json(model: SentencePieceProcessor) -> dict[str, Any]:
    """The `tokenizer.json` of a sentencepiece model: every way to join two pieces to a third, those to pieces
    of the best scores first."""
    names = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    scores = {name: model.get_score(i) for i, name in enumerate(names)}
    merges = [
        (-scores[name], f"{name[:at]} {name[at:]}")
        for name in names
        for at in range(1, len(name))
        if not name.startswith("<") and name[:at] in scores and name[at:] in scores
    ]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replaced]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": names[i], "special": True} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [text for _, text in sorted(merges)],
        },
    }  # fmt: skip
