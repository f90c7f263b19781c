"""An output folder of `tools.quantize` with damaged journals and records, and planted links."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from dev.harness.command import DONE
from dev.harness.mutate.json_tree import as_text, mutated
from dev.harness.mutate.values import weird
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.quantizing import JOURNAL, check_left, contents, interrupt, quantize
from dev.harness.subject import Subject
from tools.quantize.journal import parse

RECORD = "quantization.json"
PRECIOUS = b"years of work"


@contextmanager
def open_journal(subject: Subject) -> Iterator[Case]:
    folder = subject.work("journal")
    out, unfinished, outside = folder / "out", folder / "unfinished", folder / "outside.txt"
    interrupt(subject, unfinished, 30)
    expected = contents(subject.native)

    def case(chance: Random) -> Verdict:
        shutil.rmtree(out, ignore_errors=True)
        outside.write_bytes(PRECIOUS)
        force = chance.random() < 0.4
        shutil.copytree(subject.native if force else unfinished, out)
        (out / "notes.txt").write_bytes(PRECIOUS)
        if force:
            spoil(out / RECORD, chance, "files", ["notes.txt", "../outside.txt", str(outside), "config.json"])
        else:
            spoil(out / JOURNAL, chance, "stale", ["notes.txt", "../outside.txt"])
        if chance.random() < 0.2:
            plant(out, outside, chance)
        ended = quantize(subject.hf, out, *(["--force"] if force else []))
        for path in (out / "notes.txt", outside):
            if not path.is_file() or path.read_bytes() != PRECIOUS:
                raise Wrong(f"{path.name} is not its file, and was removed or overwritten")
        if not force or ended.status == DONE:
            check_left(out, expected)
        return ended.judged()

    yield case


def spoil(path: Path, chance: Random, key: str, names: list[str]) -> None:
    original = json.loads(path.read_bytes())
    while believable(content := spoilt(deepcopy(original), chance, key, names), original):
        pass
    path.write_bytes(as_text(content, chance))


def believable(content: Any, original: dict[str, Any]) -> bool:
    """Whether this is a journal that differs from another one in errors and digests alone. No program can
    see that it is not true."""
    try:
        parse(content)
    except (ValueError, AttributeError, TypeError):
        return False
    return blanked(content) == blanked(original)


def blanked(journal: dict[str, Any]) -> dict[str, Any]:
    shards = {name: set(errors) for name, errors in journal["shards"].items()}
    return journal | {"shards": shards, "digests": set(journal["digests"])}


def spoilt(content: Any, chance: Random, key: str, names: list[str]) -> Any:
    match chance.randrange(5):
        case 0:
            content[key] = [*content.get(key, []), chance.choice(names)]
        case 1:
            shard = chance.choice(list(content.get("shards", {})) or ["x"])
            content["shards"] = {**content.get("shards", {}), shard: weird(chance)}
        case 2 if content.get("shards"):
            errors = content["shards"][chance.choice(list(content["shards"]))]
            if isinstance(errors, dict) and errors:
                errors[chance.choice(list(errors))] = weird(chance)
        case _:
            content = mutated(content, chance)
    return content


def plant(out: Path, outside: Path, chance: Random) -> None:
    """Plant a link where the run will write a file."""
    name = chance.choice(("config.json", RECORD, JOURNAL, "model.safetensors.index.json", "tokenizer.model"))
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    place = out / (chance.choice((name, *shards)) + ".part")
    place.unlink(missing_ok=True)
    place.symlink_to(outside)
