"""Damaged trace files, read by `tools.trace summary`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from dev.harness.answers import PROMPTS, answer
from dev.harness.command import DONE, run_main
from dev.harness.mutate.json_tree import as_text, mutated
from dev.harness.mutate.values import NUMBERS
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import OFFLOADED, Subject
from runtime import Engine
from tools.trace import command as trace

BERTHS = 3  # of 8 experts, 4 of which are in slots


@contextmanager
def open_trace(subject: Subject) -> Iterator[Case]:
    file = subject.work("trace") / "trace.jsonl"
    lines = recorded(subject, file)
    original = file.read_bytes()
    known = json.loads(run_main(trace.main, ["summary", str(file), "--json"]).out)
    if not known["replay_agrees"] or not known["tiers"]["agrees"]:
        raise Wrong("the undamaged trace does not agree with its policy")

    def case(chance: Random) -> Verdict:
        as_json = chance.random() < 0.5
        file.write_bytes(damaged(lines, original, chance))
        ended = run_main(trace.main, ["summary", str(file), *(["--json"] if as_json else [])])
        if ended.status == DONE:
            check(ended.out, as_json)
        return ended.judged()

    yield case


def recorded(subject: Subject, file: Path) -> list[bytes]:
    options = replace(OFFLOADED, berths=BERTHS)
    with Engine.load(subject.native, options) as engine, engine.recording(file):
        for prompt in PROMPTS:
            answer(engine, prompt)
    return file.read_bytes().splitlines(keepends=True)


def damaged(lines: list[bytes], original: bytes, chance: Random) -> bytes:
    if chance.random() < 0.15:
        at = chance.randrange(len(original))
        return chance.choice(
            (original[:at], original[:at] + b"\xff\0" + original[at:], b"\n" + original, b"[]")
        )
    changes: dict[int, Any] = {}
    for _ in range(chance.choice((1, 1, 3))):
        at = 0 if chance.random() < 0.5 else chance.randrange(len(lines))
        changes[at] = changed(changes.get(at, json.loads(lines[at])), chance)
    lines = [
        as_text(changes[at], chance).replace(b"\n", b" ") + b"\n" if at in changes else line
        for at, line in enumerate(lines)
    ]
    if chance.random() < 0.1:
        chance.shuffle(lines)
    return b"".join(lines)


def changed(content: Any, chance: Random) -> Any:
    if not isinstance(content, dict) or not content or chance.random() < 0.5:
        return mutated(content, chance)
    numbers = [name for name, value in content.items() if isinstance(value, (int, float))]
    return {**content, chance.choice(numbers or list(content)): chance.choice(NUMBERS)}


def check(text: str, as_json: bool) -> None:
    """Raises `Wrong` for a report that its reader cannot read."""
    if as_json:
        json.loads(text, parse_constant=refuse)
    elif strange := [character for character in text.replace("\n", "") if not character.isprintable()]:
        raise Wrong(f"the report holds {strange[0]!r}")


def refuse(name: str) -> None:
    raise Wrong(f"the report holds {name}, which JSON does not have")
