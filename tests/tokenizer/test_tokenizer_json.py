"""`tokenizer.json` alone gives the ids that the `tokenizers` library gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from transformers import LlamaTokenizerFast

from tokenizer import Tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "design.md"
RUNS = " =-._\u2581ae\n\t#*"


def convert(model: Path, folder: Path) -> Path:
    """Have Transformers write `tokenizer.json` for a sentencepiece model."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    LlamaTokenizerFast.from_pretrained(str(folder)).backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    return folder


def hard_text(chance: random.Random, page: str) -> str:
    """Words, runs of one character, spaces, and anything in Unicode."""
    kinds = [
        lambda: chance.choice(RUNS) * chance.randrange(1, 60),
        lambda: "".join(chr(chance.randrange(0x20, 0xD7FF)) for _ in range(chance.randrange(1, 6))),
        lambda: chr(chance.randrange(0x1F300, 0x1FAFF)),
        lambda: page[(at := chance.randrange(len(page))) : at + chance.randrange(1, 40)],
    ]
    return "".join(chance.choice(kinds)() for _ in range(chance.randrange(1, 8)))


@pytest.mark.parametrize("name", ["v1", "v3", "small"])
def test_ids_are_the_librarys(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = convert(files[name], tmp_path / "folder")
    ours, theirs = Tokenizer.load(folder), Library.from_file(str(folder / "tokenizer.json"))
    chance, page = random.Random(7), PAGE.read_text("utf-8")
    for _ in range(1000):
        text = hard_text(chance, page)
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids
