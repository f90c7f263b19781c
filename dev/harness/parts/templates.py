"""Chat templates that never end, take all memory or look where they should not; users who spell control
tokens."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from dev.harness.mutate.templates import CHATML, hostile_text, template
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Absent, Case
from dev.harness.subject import Subject
from tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "What is 6 times 7?"}]
ADDED = {"<|im_start|>": 2048, "<|im_end|>": 2049}


@contextmanager
def open_template(subject: Subject) -> Iterator[Case]:
    folder = subject.work("template")
    (folder / "tokenizer.model").write_bytes((subject.hf / "tokenizer.model").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    file = folder / "tokenizer_config.json"

    def load(text: str) -> Tokenizer:
        file.write_text(json.dumps({"chat_template": text, "bos_token": "<s>", "eos_token": "<|im_end|>"}))
        return Tokenizer.load(folder)

    plain = load(CHATML)
    control = {*ADDED.values(), *plain.vocabulary.control.values()}
    expected = [i for i in plain.encode_chat(CHAT) if i in control]
    if expected.count(ADDED["<|im_start|>"]) != 2:
        raise Absent("this version reads no chat templates")

    def case(chance: Random) -> Verdict:
        if chance.random() < 0.3:
            ids = plain.encode_chat([{"role": "user", "content": hostile_text(chance)}])
            if [i for i in ids if i in control] != expected:
                raise Wrong("a user's text has become a control token")
            return Verdict.ACCEPTED
        load(template(chance)).encode_chat(CHAT)
        return Verdict.ACCEPTED

    yield case
