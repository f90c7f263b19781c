"""A short run of the harness, part by part; and that it finds what there is to find."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from dev.harness.command import Ended
from dev.harness.judge import judge
from dev.harness.mutate import protobuf
from dev.harness.mutate.json_tree import as_text, mutated
from dev.harness.outcome import Leaked, Verdict, Wrong
from runtime.engine import DEMO

ROOT = Path(__file__).resolve().parents[2]
# Of each part about as many cases as two seconds have room for. Fewer are tried where the machine is slow.
CASES = {
    "headers": 60, "gguf": 40, "index": 30, "configs": 30, "tokenizer": 40, "template": 40, "trace": 40,
    "sessions": 60,
    "journal": 8, "kills": 6, "options": 60, "io": 12, "allocation": 12, "threads": 20, "signals": 5,
    "interrupts": 30,
    "soak": 4, "tiers": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What one run of all parts reports, by part."""
    file = tmp_path_factory.mktemp("harness") / "report.json"
    counts = ",".join(f"{part}={count}" for part, count in CASES.items())
    done = subprocess.run(
        [sys.executable, "-m", "dev.harness", "--seed", "5", "--seconds", "75", "--only", ",".join(CASES),
         "--cases", counts, "--json", str(file), "--quiet"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert file.is_file(), done.stderr
    return {part["part"]: part for part in json.loads(file.read_text())["parts"]}


@pytest.mark.parametrize("part", CASES)
def test_nothing_breaks(report: dict[str, dict[str, object]], part: str) -> None:
    found = report[part]
    assert found["findings"] == []
    assert found["tried"] > 0 or found["skipped"]


# --- what the harness itself is made of


def test_messages_are_judged() -> None:
    from runtime import RequestError

    assert judge(0, RequestError("the prompt is empty; give at least one token")).verdict is Verdict.REFUSED
    assert judge(0, RequestError("two\nlines")).verdict is Verdict.RAW
    assert judge(0, RequestError("\x1b[2J")).verdict is Verdict.RAW
    assert judge(0, KeyError("x")).verdict is Verdict.RAW
    assert judge(0, Wrong("6")).verdict is Verdict.WRONG
    assert judge(0, Leaked("a thread")).verdict is Verdict.LEAK


def test_ends_of_commands_are_judged() -> None:
    assert Ended(0, "text", "").judged() is Verdict.ACCEPTED
    assert Ended(1, "", "warning: x\nerror: no such file\n").judged() is Verdict.REFUSED
    for err in (
        "Traceback (most recent call last):\n  x\nerror: y",
        "no prefix",
        "error: \x1b[2J",
        "error: " + "y" * 500,
    ):
        with pytest.raises(Wrong):
            Ended(1, "", err).judged()


def test_the_same_chance_makes_the_same_damage() -> None:
    value = {"a": [1, 2.5, {"b": "text"}], "c": None}
    for seed in range(200):
        texts = [as_text(mutated(value, chance), chance) for chance in (Random(seed), Random(seed))]
        assert texts[0] == texts[1]


def test_a_model_is_taken_apart_and_put_together() -> None:
    data = (DEMO / "tokenizer.model").read_bytes()
    assert protobuf.encoded(protobuf.parse(data)) == data


# Run in a process of its own, because the harness forks and the tests have threads.
SELF_TEST = """
import os, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Part
from dev.harness.subject import Subject
from dev.harness.supervise import run_part

kept = []

@contextmanager
def open_part(subject):
    number = iter(range(100))
    def case(chance):
        match next(number):
            case 1: raise KeyError("raw")
            case 2: raise Wrong("another text")
            case 3: kept.append(open(os.devnull))
            case 4:
                thread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
                thread.start()
            case 5: kept.append(bytes(1 << 20) * 40)
            case 6: sum(range(30_000_000))
            case 7: os.kill(os.getpid(), 11)
        return Verdict.ACCEPTED
    yield case

@contextmanager
def open_hanging(subject):
    def case(chance):
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    yield case

part = Part("self-test", open_part, cpu_seconds=0.2, memory=32 << 20)
tally = run_part(part, Subject(Path(sys.argv[1])), 0, 0, 8, 60)
print([(found.at, found.verdict.value) for found in tally.findings])
tally = run_part(Part("hanging", open_hanging, patience=0.5), Subject(Path(sys.argv[1])), 0, 7, 1, 60)
print([(found.at, found.verdict.value, "case" in found.trace) for found in tally.findings])
"""


def test_every_kind_of_failure_is_found(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SELF_TEST, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == [
        "[(1, 'raw'), (2, 'wrong'), (3, 'leak'), (4, 'leak'), (5, 'leak'), (6, 'hang'), (7, 'raw')]",
        "[(7, 'hang', True)]",
    ], done.stderr
