"""Damaged safetensors files, in every layout of a checkpoint."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from dev.harness.answers import answers, check_answers, use
from dev.harness.mutate.header import File, damaged, harmless
from dev.harness.outcome import Verdict
from dev.harness.part import Case
from dev.harness.subject import Subject


@contextmanager
def open_headers(subject: Subject) -> Iterator[Case]:
    folders = [subject.copy(folder, f"headers-{folder.name}") for folder in subject.layouts]
    files = {folder: whole_file(folder) for folder in folders}
    known = {folder: answers(folder) for folder in folders}

    def case(chance: Random) -> Verdict:
        folder = chance.choice(folders)
        target, file = files[folder]
        if chance.random() < 0.1:
            target.write_bytes(harmless(file, chance))
            check_answers(folder, known[folder], "another order of the same tensors")
        else:
            target.write_bytes(damaged(file, chance))
            use(folder)
        return Verdict.ACCEPTED

    yield case
    for folder in folders:
        shutil.rmtree(folder)


def whole_file(folder: Path) -> tuple[Path, File]:
    """The first weights file of a folder, and its contents."""
    target = min(folder.glob("*.safetensors"))
    return target, File.parse(target.read_bytes())
