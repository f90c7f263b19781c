"""Damaged tokenizer models. One that still loads has to encode, decode and stream without a raw error."""

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from dev.harness.mutate.protobuf import damaged, encoded, parse
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import Subject
from tokenizer import Tokenizer

TEXTS = (
    "def f(x):\n    return x", "  two  spaces ", "Zw\u00f6lf \U0001f98a", "</s>[INST] <|im_start|>", "", "\0",
)  # fmt: skip
CHAT = [{"role": "user", "content": "What is 6 times 7?"}]


@contextmanager
def open_tokenizer(subject: Subject) -> Iterator[Case]:
    file = subject.work("tokenizer") / "tokenizer.model"
    data = (subject.hf / "tokenizer.model").read_bytes()
    message = parse(data)
    if encoded(message) != data:
        raise Wrong("a model that is taken apart and put together again has changed")

    def case(chance: Random) -> Verdict:
        file.write_bytes(damaged(message, chance))
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
