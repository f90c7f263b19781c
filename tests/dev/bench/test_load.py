"""The tools that write and load random checkpoints."""

from pathlib import Path

import pytest
import torch

from dev.bench import command as bench
from dev.bench import random_checkpoint
from dev.bench.load import load_once
from dev.bench.random_checkpoint import shape_of_size
from model.checkpoint import open_checkpoint
from model.mixtral import Mixtral


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
    result = load_once(tmp_path, torch.float32)
    assert result["model_bytes"] == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "status"), [(["load", "no/such/folder"], 1), (["load", "--bytes", "many"], 2)]
)
def test_bench_says_what_is_wrong(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
