"""The text that the demo checkpoint is trained and judged on: the standard library that every Python
carries."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

EXCLUDED = {"site-packages", "test", "tests", "idle_test"}
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Corpus:
    """Decoded files: those to train on, and those held out, which are the first and every twentieth after
    it."""

    train: list[str]
    held_out: list[str]

    @property
    def held_out_bytes(self) -> bytes:
        return b"".join(text.encode() for text in self.held_out)


def standard_library(root: Path | None = None) -> Corpus:
    """Every `*.py` below the standard library's folder, sorted by relative POSIX path.

    Bytes that are not UTF-8 (a few files declare another encoding) become U+FFFD.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    chosen = sorted((name for name in names if not EXCLUDED.intersection(name.parts)), key=Path.as_posix)
    texts = [(root / name).read_bytes().decode("utf-8", errors="replace") for name in chosen]
    held_out = texts[::HELD_OUT_EVERY]
    del texts[::HELD_OUT_EVERY]
    return Corpus(train=texts, held_out=held_out)
