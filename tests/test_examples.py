"""The programs in examples/, run as they stand."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(name: str, *args: Any) -> str:
        run_path(str(ROOT / "examples" / f"{name}.py"))["main"](*args)
        return capsys.readouterr().out

    return run


def test_all_are_tested_and_short() -> None:
    assert [f"test_{name}" for name in EXAMPLES] == sorted(
        name for name in globals() if name.removeprefix("test_") in EXAMPLES
    )
    for name in EXAMPLES:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 55


def test_generate(run: Callable[..., str]) -> None:
    text = run("generate")
    assert text.startswith('def read_bytes(obj):\n    """\n') and "# ended by eos; " in text
    assert run("generate", None, "import ").startswith("import ")


def test_chat(run: Callable[..., str]) -> None:
    text = run("chat")
    turns = re.findall(r"# a prompt of (\d+) new tokens; the conversation has (\d+)", text)
    (first, total), (second, more) = [tuple(map(int, turn)) for turn in turns]
    assert text.count("> ") >= 2 and first < total < more and second < more - total + 48


def test_policy(run: Callable[..., str]) -> None:
    found = re.findall(r"^(\w+) +([\d.]+)% hits", run("policy"), re.MULTILINE)
    hits = {name: float(rate) for name, rate in found}
    assert list(hits) == ["lru", "lfu", "static", "LRU2"]
    assert hits["LRU2"] > hits["lru"] > hits["static"]


def test_batch(run: Callable[..., str]) -> None:
    text = run("batch")
    assert text.startswith('def read_bytes(obj):\n    """\n') and text.count("were there already") == 4
    again = run("batch", None, "def read_bytes(obj):", "def read_bytes(obj):")
    shown = re.findall(r"# (\d+) tokens of the prompt", again)
    assert shown[0] == "0" and int(shown[1]) > 5


def test_logits(run: Callable[..., str]) -> None:
    lines = run("logits").splitlines()
    assert len(lines) == 31 and lines[1].startswith("'class'") and 2 < float(lines[-1].split()[1]) < 4
    assert "over 2 tokens" in run("logits", None, "import os")


def test_schema(run: Callable[..., str]) -> None:
    forms = [ast.literal_eval(line) for line in run("schema").splitlines()]
    assert len(forms) == 3 and all(list(form) == ["name", "kind", "lines"] for form in forms)
    assert all(1 <= form["lines"] <= 5000 for form in forms)
