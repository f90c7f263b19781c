"""Damaged indexes of shards."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from dev.harness.answers import answers, check_answers, use
from dev.harness.mutate.json_tree import as_text, mutated
from dev.harness.mutate.values import weird_text
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import Subject


@contextmanager
def open_index(subject: Subject) -> Iterator[Case]:
    folder = subject.copy(subject.sharded, "index")
    target = folder / "model.safetensors.index.json"
    original = json.loads(target.read_bytes())
    known = answers(folder)

    def case(chance: Random) -> Verdict:
        if chance.random() < 0.05:
            target.write_text(json.dumps(reordered(original, chance), indent=chance.choice((None, 4))))
            check_answers(folder, known, "another order of the same index")
            return Verdict.ACCEPTED
        target.write_bytes(as_text(changed(original, chance), chance))
        if use(folder) != known:
            raise Wrong("the index changed which weights were read")  # it only says in which file each is
        return Verdict.ACCEPTED

    yield case


def reordered(index: dict[str, Any], chance: Random) -> dict[str, Any]:
    names = list(index["weight_map"])
    chance.shuffle(names)
    return {"weight_map": {name: index["weight_map"][name] for name in names}, "metadata": index["metadata"]}


def changed(index: dict[str, Any], chance: Random) -> Any:
    if chance.random() < 0.5:
        return mutated(index, chance)
    weights = dict(index["weight_map"])
    name = chance.choice(list(weights))
    file = chance.choice(
        ("../hf/model.safetensors", "config.json", weird_text(chance), "x.safetensors", weights[name])
    )
    weights[name] = file if chance.random() < 0.7 else file + ".safetensors"
    return {**index, "weight_map": weights}
