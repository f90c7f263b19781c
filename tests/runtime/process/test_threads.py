"""How many threads compute: as asked, within what the process may use. The program keeps its own number."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime import Engine, EngineOptions, OptionError, SamplingParams
from runtime.process.threads import pick_threads, usable_processors, using_threads


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def machine(root: Path, quota: str) -> Path:
    """Make a file system in which the process is in a group with this `cpu.max`."""
    group = root / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/job\n")
    (root / "proc/self/mountinfo").write_text("30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (group / "cpu.max").write_text(quota)
    return root


@pytest.mark.parametrize(
    ("quota", "most"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", 1 << 20)]
)
def test_a_quota_is_not_exceeded(quota: str, most: int, tmp_path: Path) -> None:
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert usable_processors(machine(tmp_path, quota)) == min(affine, most)


def test_a_part_of_a_processor_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert usable_processors(machine(tmp_path, "390000 100000")) == 3


def test_choice() -> None:
    torch.set_num_threads(2)
    assert pick_threads(None, usable=1) == 1
    assert pick_threads(None, usable=8) == 2  # the program's own number is not raised
    assert pick_threads(5, usable=1) == 5  # what is asked for counts


def test_a_request_computes_with_the_number_and_the_program_keeps_its_own() -> None:
    torch.set_num_threads(2)
    seen = []
    with Engine.load(None, EngineOptions(device="cpu", dtype="float32", context=64, threads=1)) as engine:
        engine.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        tokens = engine.generate("def ", SamplingParams(max_new_tokens=3, temperature=0))
        for _ in tokens:
            assert torch.get_num_threads() == 2
        engine.logits([1, 5, 7])
    assert seen and set(seen) == {1} and torch.get_num_threads() == 2


def test_an_error_puts_the_number_back() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="within"), using_threads(1):
        assert torch.get_num_threads() == 1
        raise ValueError("within")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, 10**400])
def test_numbers_that_make_no_sense(threads: object) -> None:
    with pytest.raises(OptionError, match=r"threads is .*, and must be"):
        EngineOptions(threads=threads)  # type: ignore[arg-type]
