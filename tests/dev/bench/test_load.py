"""The tools that write and load random checkpoints."""

import json
import sys
from pathlib import Path

import pytest
import torch

from dev.bench import command as bench
from dev.bench import random_checkpoint
from dev.bench.random_checkpoint import shape_of_size
from model.checkpoint import open_checkpoint
from model.mixtral import Mixtral
from runtime.engine import Engine
from runtime.options import EngineOptions

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize("size", [2_000_000])
def test_random_checkpoint_is_sane_and_about_that_size(tmp_path: Path, size: int) -> None:
    assert random_checkpoint.main([str(tmp_path), "--bytes", str(size), "--experts", "8"]) == 0
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == shape_of_size(size)
    assert abs(checkpoint.bytes / size - 1) < 0.25
    model = Mixtral(checkpoint.config)
    checkpoint.load(model)
    with torch.no_grad():
        logits = model(torch.arange(10).view(2, 5))
    assert logits.isfinite().all() and 0.1 < logits.std() < 10


def test_a_native_one_has_its_formats(tmp_path: Path) -> None:
    words = ["--bytes", "2MB", "--attention-format", "4", "--experts-format", "3g32", "--head-format", "8"]
    assert random_checkpoint.main([str(tmp_path), *words]) == 0
    about = open_checkpoint(tmp_path).description
    assert about.startswith("native, ") and "attention 4, experts 3g32, head 8, " in about
    with Engine.load(tmp_path, EngineOptions(device="cpu", dtype="float32")) as engine:
        logits = engine.logits([1, 2, 3])
    assert logits.isfinite().all() and 0.1 < logits.std() < 10


@linux
def test_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["load", "--bytes", "2MB", "--runs", "1", "--threads", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["loads"]
    assert [row["files"] for row in rows] == ["warm", "cold"] * (len(rows) // 2)
    for row in rows:
        assert row["files_mb"] == pytest.approx(2, rel=0.25)
        assert 0 < row["seconds"] < row["first_token_s"] and row["private_mb"] <= row["peak_mb"]
    assert err.count("\n") == len(rows) and err.startswith(f"way {rows[0]['way']}, files warm, seconds ")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["load", "no/such/folder"], 1),
        (["load", "--bytes", "many"], 2),
        (["load", "--bytes", "2MB", "--gguf", "x"], 2),
    ],
)
def test_bench_says_what_is_wrong(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
