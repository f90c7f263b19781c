"""The programs in examples/, run as they stand."""

import ast
import re
import socket
import subprocess
import sys
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


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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


def test_ranks(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    """One rank here, and two by torchrun: with the same text."""
    where = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    with monkeypatch.context() as patch:
        for name, value in where.items():
            patch.setenv(name, value)
        alone = run("ranks")
    assert alone.startswith('def read_bytes(obj):\n    """\n') and "#" not in alone
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/ranks.py"]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout == alone + "# 4 layers from layer 4 on\n# 4 layers from layer 0 on\n", done.stderr


def test_schema(run: Callable[..., str]) -> None:
    forms = [ast.literal_eval(line) for line in run("schema").splitlines()]
    assert len(forms) == 3 and all(list(form) == ["name", "kind", "lines"] for form in forms)
    assert all(1 <= form["lines"] <= 5000 for form in forms)
