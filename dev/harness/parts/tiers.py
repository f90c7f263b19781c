"""Experts are read from files while requests run, and at any of these reads the file is damaged, cut short,
replaced or deleted, or the read fails. A request is right, or refused in one line."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest import mock

from dev.harness.answers import PROMPTS, answer, answers
from dev.harness.judge import fault_of
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import OFFLOADED, Subject
from runtime import Engine, RequestError
from runtime.experts import files
from runtime.experts.files import OpenFile

# Not mapped: the system ends a process whose mapped file is cut short.
TIERED = replace(OFFLOADED, map=False, lookahead=1)
BERTHS = (2, 3, 5)  # of 8 experts, 4 of which are in slots
Act = Callable[[Path, Random], None]


def damage(path: Path, chance: Random) -> None:
    with path.open("r+b") as file:
        file.seek(chance.randrange(path.stat().st_size))
        file.write(chance.randbytes(64))


def cut(path: Path, chance: Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def exchange(path: Path, chance: Random) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(chance.randbytes(path.stat().st_size))
    other.replace(path)


def delete(path: Path, chance: Random) -> None:
    path.unlink()


def fail(path: Path, chance: Random) -> None:
    number = chance.choice((errno.EIO, errno.ESTALE, errno.EAGAIN))
    raise OSError(number, os.strerror(number), str(path))


HARMLESS = (exchange, delete)  # who has a file open keeps it
PASSING = (fail,)


class Reads:
    """Stands in for `read_at`. Acts before or after the read number `at`, and may read less than asked."""

    def __init__(self, at: int | None, act: Act, chance: Random) -> None:
        self.at, self.act, self.chance = at, act, chance
        self.calls = 0
        self.real = files.read_at
        self.first = chance.random() < 0.5
        self.short = chance.random() < 0.3

    def __call__(self, file: OpenFile, memory: memoryview, offset: int) -> int:
        self.calls += 1
        now = self.calls == self.at
        if now and self.first:
            self.act(file.path, self.chance)
        count = self.real(
            file, memory[: len(memory) // 2] if self.short and len(memory) > 8192 else memory, offset
        )
        if now and not self.first:
            self.act(file.path, self.chance)
        return count


@contextmanager
def open_tiers(subject: Subject) -> Iterator[Case]:
    known = dict(zip(PROMPTS, answers(subject.native), strict=True))

    def case(chance: Random) -> Verdict:
        folder = subject.copy(subject.native, "tiers")
        act = chance.choice((damage, cut, *HARMLESS, *PASSING))
        with Engine.load(folder, replace(TIERED, berths=chance.choice(BERTHS))) as engine:
            reads = Reads(chance.randint(1, 30), act, chance)
            with mock.patch.object(files, "read_at", reads):
                asked = [ask(engine, known, chance) for _ in range(chance.randint(1, 4))]
            if act in HARMLESS and not all(asked):
                raise Wrong(f"a request failed after {act.__name__}")
            if act not in (damage, cut) and not ask(engine, known, chance):
                raise Wrong(f"after {act.__name__}, the next request failed")
        return Verdict.ACCEPTED if all(asked) else Verdict.REFUSED

    yield case


def ask(engine: Engine, known: dict[tuple[int, ...], list[int]], chance: Random) -> bool:
    """Whether the engine answers. Raises `Wrong` for a wrong answer, or a refusal that is not one line."""
    prompt = chance.choice(PROMPTS)
    try:
        found = answer(engine, prompt)
    except RequestError as error:
        if fault := fault_of(str(error)):
            raise Wrong(f"refused with {fault}: {error}") from error
        return False
    if found != known[prompt]:
        raise Wrong("an answer differs from a resident engine's")
    return True
