"""`python -m tools.bench gpu`, its parts run in this process, at a size for a CPU; and how parts end."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.shapes import SHAPES
from tools.bench import command as bench
from tools.bench import gpu, offload
from tools.bench.gpu import Outcome, Part, run_part, run_process
from tools.bench.ways import LADDER

SMALL = ModelConfig(
    vocab=128, hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, ffn=128, experts=4,
    experts_per_token=2, context=512, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
PARTS = ["link", "decode-4", "decode-2g64", "offload-2", "prefill", "offload-3", "memory-12GiB", "naive",
         "decode-3g128", "memory-16GiB"]  # fmt: skip
LOG = "a.py:1: RuntimeWarning: no graphs\n  warn()\n"


def in_process(words: tuple[str, ...], seconds: float) -> Outcome:
    """A part, without a process."""
    assert words[0] == "tools.bench" and seconds > 0
    out, log = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        status = bench.main(list(words[1:]))
    return Outcome(out.getvalue(), log.getvalue(), "" if status == 0 else gpu.last_line(log.getvalue()))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "quarter", SMALL)
    monkeypatch.setattr(offload, "WARM_UP", 3)
    monkeypatch.setattr(gpu, "run_process", in_process)


def measured(folder: Path, *words: str) -> dict[str, Any]:
    words = ("gpu", "--out", str(folder), "--device", "cpu", "--tokens", "4", "--prompt", "70", *words)
    assert bench.main([*words, "--json"]) == 0
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in PARTS}


def test_the_whole_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = measured(tmp_path, "--shape", "quarter", "--layers", "2")
    out, err = capsys.readouterr()
    parts = json.loads(out)["parts"]
    assert list(parts) == PARTS == [line.split(":")[0] for line in err.splitlines()]
    not_run = {name: why for name, why in parts.items() if why != "done"}
    assert not_run == {
        "memory-12GiB": "not run: a CPU's memory has no limit to keep",
        "memory-16GiB": "not run: a CPU's memory has no limit to keep",
        "naive": "not run: on a CPU nothing is moved",
    }
    for name, result in results.items():
        assert result["command"].startswith(("python -m tools.", "python -m dev."))
        assert ("error" in result) == (name in not_run)
    modes = {n: [row["mode"] for row in results[f"offload-{n}"]["report"]["modes"]] for n in (2, 3)}
    assert modes == {2: ["computing", *LADDER], 3: ["computing", "full"]}
    text = (tmp_path / "results.txt").read_text()
    assert text.count("## ") == len(PARTS) and text.count("not run: ") == 3
    assert "quarter, 2 layers, random, attention 4, experts 3g128" in text and "whole layers" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_real_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At reduced size, in processes of their own; Transformers' part is not this project's to promise."""
    monkeypatch.undo()
    words = ["gpu", "--out", str(tmp_path), "--shape", "quarter", "--layers", "4", "--prompt", "300"]
    assert bench.main([*words, "--device", "cuda"]) == 0
    for name in PARTS:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert "error" not in result or name == "naive", (name, result)
        if name.split("-")[0] in ("decode", "offload", "memory"):
            assert result["report"]["graphs"] is True


def test_a_part_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(words: tuple[str, ...], seconds: float) -> Outcome:
        if words[1] == "offload":
            raise OSError("no\n  such machine")
        return Outcome("{", "") if words[1] == "link" else Outcome("", LOG, "failed (1): out of memory")

    monkeypatch.setattr(gpu, "run_process", broken)
    results = measured(tmp_path, "--shape", "quarter")
    assert results["link"]["error"].startswith("JSONDecodeError: ")
    assert results["offload-3"]["error"] == "OSError: no such machine"
    assert results["prefill"]["error"] == "failed (1): out of memory"
    assert (tmp_path / "prefill.log").read_text() == LOG
    assert results["prefill"]["warnings"] == ["no graphs"]
    assert "warning: no graphs\n" in (tmp_path / "results.txt").read_text()
    assert "prefill: 0.0 of at most 60 s: failed (1): out of memory" in capsys.readouterr().err


def test_no_time_left(tmp_path: Path) -> None:
    results = measured(tmp_path, "--shape", "quarter", "--seconds", "1")
    assert results["link"]["error"] == "not run: out of time" and results["link"]["seconds"] == 0


def test_full_size_wants_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["gpu", "--out", str(tmp_path / "new"), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: there is no GPU here") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_processes_and_how_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real runner, on modules of Python's that start quickly."""
    monkeypatch.setattr(gpu, "run_process", run_process)
    assert run_process(("calendar", "2026", "11"), 30).out.split()[:2] == ["November", "2026"]
    failed = run_process(("json.tool", "/nowhere"), 30)
    assert failed.error.startswith("failed (") and "/nowhere" in failed.error
    slow = Part("slow", ("timeit", "-n", "1", "import time; time.sleep(60)"), 1.0)
    result = run_part(slow, 9.0, tmp_path)
    assert result["error"] == "not done within 1 s" and result["seconds"] >= 1
