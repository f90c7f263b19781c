import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import Identity
from runtime.options import EngineOptions
from runtime.ranks.agreement import OWN, ROOT, differences, facts, version

MODEL = Identity("demo", "a" * 64)
CPU = EngineOptions(device="cpu")
OTHERWISE: dict[str, Any] = {  # another value of every option
    "device": "cpu", "dtype": "float16", "vram": "3GiB", "ram": "3GiB", "map": False, "context": 77, "kv": 8,
    "chat_template": "x.jinja", "threads": 3, "offload": "always", "slots": 3, "berths": 30, "policy": "lfu",
    "lookahead": 2, "prefetch": 2, "graphs": False, "misses": "auto", "link_gbps": 3.0, "disk_gbps": 3.0,
    "cpu_gbps": 3.0, "parallel": 3, "distributed": True, "rank_layers": "1,7", "rank_timeout": 3.0,
}  # fmt: skip


def shared(*ranks: dict[str, Any]) -> list[Any]:
    """As it arrives."""
    return json.loads(json.dumps(ranks))


def test_ranks_that_agree() -> None:
    assert differences(shared(*[facts(CPU, MODEL)] * 4)) is None
    assert (
        differences(shared(facts(CPU, MODEL), facts(CPU, Identity("elsewhere/demo", MODEL.digest)))) is None
    )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineOptions)])
def test_every_option_must_be_the_same_but_for_those_of_a_machine(name: str) -> None:
    base = dataclasses.replace(CPU, distributed=True) if name == "rank_layers" else CPU
    other = dataclasses.replace(base, **{name: OTHERWISE[name]})
    line = differences(shared(facts(base, MODEL), facts(base, MODEL), facts(other, MODEL)))
    if name in OWN:
        assert line is None
    else:
        assert line is not None and "\n" not in line
        assert line.startswith(f"rank 2 has the option {name} {OTHERWISE[name]}, and rank 0 ")


def test_a_policy_of_ones_own_has_a_name() -> None:
    class Mine:
        pass

    own = facts(dataclasses.replace(CPU, policy=Mine), MODEL)  # type: ignore[arg-type]
    assert "Mine" in str(differences(shared(own, facts(CPU, MODEL))))


def test_another_checkpoint_is_named() -> None:
    line = differences(shared(facts(CPU, MODEL), facts(CPU, Identity("/b", "b" * 64))))
    assert line == (
        "rank 1 has another checkpoint than rank 0: /b (digest bbbbbbbbbbbb) and demo (aaaaaaaaaaaa); "
        "give all ranks the same --model, with the same files"
    )


def test_builds_of_torch_may_differ_and_versions_may_not() -> None:
    one, two = shared(facts(CPU, MODEL), facts(CPU, MODEL))
    assert "+" not in one["torch"]
    two["torch"] = "2.11.0"
    assert "rank 1 has torch 2.11.0, and rank 0 has" in str(differences([one, two]))


def test_numba_counts_where_a_cpu_computes() -> None:
    with_it, without, gpu = shared(facts(CPU, MODEL), facts(CPU, MODEL), facts(CPU, MODEL))
    with_it["numba"], without["numba"] = True, False
    del gpu["numba"]
    assert differences([with_it, gpu, with_it]) is None and differences([without, gpu]) is None
    assert "rank 0 has numba and rank 2 has not" in str(differences([with_it, gpu, without]))
    assert "rank 2 has numba and rank 1 has not" in str(differences([gpu, without, with_it]))


def test_the_sources_are_part_of_the_version(tmp_path: Path) -> None:
    for room in ("model", "runtime", "tokenizer"):
        shutil.copytree(
            ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
        )
    before = version(tmp_path)
    assert before == version(ROOT)
    with (tmp_path / "model" / "moe.py").open("a") as file:
        file.write("# another state\n")
    assert version(tmp_path) != before
    one, two = shared(facts(CPU, MODEL), facts(CPU, MODEL))
    two["mixtral-runtime"] = version(tmp_path)
    assert "rank 1 has mixtral-runtime" in str(differences([one, two]))


def test_facts_of_another_version_are_no_traceback() -> None:
    assert "rank 1 has mixtral-runtime None" in str(differences([*shared(facts(CPU, MODEL)), {}]))
