"""Texts on which two tokenizers part if they can, and texts of which no part is a control token."""

from __future__ import annotations

import random
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "design.md").read_text("utf-8")
RUNS = " =-._\u2581ae\n\t#*/0\u00e9"
PIECES = [
    "", " ", "  ", "\u2581", "\r\n", "\0", "\x7f", "\u00a0", "\u200b", "\u200d", "\ufeff", "\ufffd",
    "\U0010ffff", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "<|im_end|>", "e\u0301", "\u0301", "狐狸",
    "👩\u200d🚀", "🇩🇪", "لومڑی", "\ufb01", "\uff21", "½", "\u2028", "\u0133", "\U000e0001",
]  # fmt: skip


WORDS = (
    "Hello", "what is", " two  spaces", "\n", "\n\n", "naïve café", "日本語", "🦊", "x = 1;", "\tindent",
    "...",    "'quoted'", "{{ braces }}", "<b>bold</b>", "&amp;", "A", "end.", " ", "###", "[1, 2]", "a|b",
    "1 < 2 > 0",
)  # fmt: skip


def hard_text(chance: random.Random) -> str:
    """Words, code, runs of one character, spaces, names of tokens, and anything in Unicode."""
    kinds = [
        lambda: chance.choice(RUNS) * chance.randrange(1, 60),
        lambda: chance.choice(PIECES),
        lambda: " " * chance.randrange(5),
        lambda: "".join(character(chance) for _ in range(chance.randrange(1, 6))),
        lambda: PAGE[(at := chance.randrange(len(PAGE))) : at + chance.randrange(1, 40)],
    ]
    return "".join(chance.choice(kinds)() for _ in range(chance.randrange(1, 8)))


def character(chance: random.Random) -> str:
    """Any character but halves of surrogate pairs."""
    code = chance.choice([chance.randrange(0xD800), chance.randrange(0xE000, 0x110000)])
    return chr(code)


def random_text(chance: random.Random) -> str:
    return "".join(chance.choice(["", " "]) + chance.choice(WORDS) for _ in range(chance.randint(1, 8)))
