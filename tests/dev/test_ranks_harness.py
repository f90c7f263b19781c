"""The harness's part for ranks, with ranks that are stand-ins: it is content with good ones, and finds the
mistakes of others."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from dev.harness.outcome import Leaked, Verdict, Wrong
from dev.harness.ranks.acts import CUT, KILL, STOP
from dev.harness.ranks.asked import Asked, Ordinary
from dev.harness.ranks.cuts import Cuts, Limits
from dev.harness.ranks.disagreeing import Checkpoints
from dev.harness.ranks.launching import WAYS, Way
from dev.harness.ranks.left import left_processes
from dev.harness.ranks.moments import WRITING, Pace
from dev.harness.ranks.namespaces import PREFIX, machines, present, why_not
from dev.harness.ranks.one_process import written_by_one

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_ranks.py")
OURS = f"{PREFIX}{os.getpid()}-"
HAND, APART = WAYS[1], WAYS[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], str]:
    """What one stand-in writes, by the messages that are typed."""
    folder = tmp_path_factory.mktemp("alone")
    words = {(): [], ("Hi", "Why"): ["--chat"]}
    command = [sys.executable, str(FAKE), "--model", str(folder)]
    return {
        messages: written_by_one([*command, *more], messages, folder / f"{len(messages)}")
        for messages, more in words.items()
    }


Texts = dict[tuple[str, ...], str]


def cuts(
    texts: Texts, folder: Path, way: Way = HAND, fault: str = "none", limit: float = 3.0, differ: bool = True
) -> Cuts:
    """Cases with stand-ins that make a mistake."""
    model = folder / "model"
    model.touch()
    command = [sys.executable, str(FAKE), "--model", str(model), "--rank-timeout", "0.5", "--fault", fault]
    asked = [
        Asked((*command, *["--chat"] * bool(messages)), text, messages) for messages, text in texts.items()
    ]
    has = Checkpoints(str(FAKE), str(folder), str(folder / "nothing")) if differ else None
    pace, ordinary = Pace(0.1, 0.05, 0.05), Ordinary()
    ordinary.learn("plan: 3 layers\n")
    limits = Limits(limit, limit, leaving=0.5)
    return Cuts(asked[0], asked[1], has, limits, folder / "case", [way], pace, ordinary)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not left_processes(tmp_path / "case" / "tmp") and not present(OURS)


def many(cases: Cuts, count: int) -> set[Verdict]:
    return {cases(Random(number)) for number in range(count)}


def test_good_ranks_pass(texts: Texts, tmp_path: Path) -> None:
    cases = cuts(texts, tmp_path)
    cases.learn()
    assert many(cases, 6) <= {Verdict.REFUSED, Verdict.ACCEPTED}
    assert cases.cut(HAND, 2, Random(1), WRITING, STOP) is Verdict.REFUSED
    figures = "\n".join(cases.figures())
    assert "7 by hand" in figures and "SIGSTOP" in figures and "has not answered for 0.5 s" in figures


FAULTS = {
    "deaf": "have not ended",
    "traceback": "a traceback",
    "wrong text": "a wrong text",
    "two lines": "2 lines",
    "no line": "0 lines",
    "well": "as if all were well",
    "folder": "temporary folder",
    "child": "left 1 processes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_found(texts: Texts, tmp_path: Path, fault: str) -> None:
    cases = cuts(texts, tmp_path, fault=fault, limit=1.5)
    with pytest.raises((Wrong, Leaked), match=FAULTS[fault]):
        for number in range(10):  # until the victim is the rank that does not make the mistake
            cases.cut(HAND, 2, Random(number), WRITING, KILL)


def test_ranks_that_do_not_notice_their_differences_are_found(texts: Texts, tmp_path: Path) -> None:
    cases = cuts(texts, tmp_path, fault="agrees")
    with pytest.raises(Wrong, match="writes a text"):
        for number in range(20):
            cases.disagree(HAND, 2, Random(number))


@pytest.mark.skipif(bool(why_not()), reason="no network namespaces here")
def test_a_cut_network_is_noticed(texts: Texts, tmp_path: Path) -> None:
    cases = cuts(texts, tmp_path, APART)
    assert cases.cut(APART, 2, Random(1), WRITING, CUT) is Verdict.REFUSED
    assert many(cases, 2) <= {Verdict.REFUSED, Verdict.ACCEPTED}
    assert any("network cut" in line for line in cases.figures())


@pytest.mark.skipif(bool(why_not()), reason="no network namespaces here")
def test_machines_reach_each_other_until_they_are_cut() -> None:
    ask = "import socket; socket.create_connection(('{}', 1), timeout=0.3)"
    with machines(2) as made:
        for reached, outside in ((True, False), (False, False), (False, True)):
            if not reached:
                made.cut(1, outside)
            words = [*made.inside(0), sys.executable, "-c", ask.format(made.addresses[1])]
            said = subprocess.run(words, capture_output=True, text=True).stderr
            assert ("ConnectionRefusedError" in said) is reached
    assert not present(OURS)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_start_them(texts: Texts, tmp_path: Path, way: Way) -> None:
    if way.apart and why_not():
        pytest.skip("no network namespaces here")
    many(cuts(texts, tmp_path, way, limit=30), 10)


@pytest.mark.slow
def test_real_ranks_end_well_whatever_befalls_them(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    words = ["--only", "ranks", "--cases", "12", "--seconds", "900", "--json", str(file), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "dev.harness", *words], cwd=ROOT, capture_output=True, text=True
    )
    (found,) = json.loads(file.read_text())["parts"]
    assert found["findings"] == [] and found["tried"] > 0, done.stderr
