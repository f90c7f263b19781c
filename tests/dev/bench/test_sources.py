"""The benchmark of `tools.quantize` on a model that takes no time."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from dev.bench import sources
from dev.bench.random_checkpoint import SMALL

SHAPE = dataclasses.replace(
    SMALL, vocab=2048, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=256, experts=2
)


@pytest.mark.parametrize("kind", sources.LAYERS)
def test_a_row(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIXTRAL_8X7B", SHAPE)
    args = argparse.Namespace(only=[kind], folder=tmp_path, attention="4", experts="3g64", threads=1)
    row = sources.run(args)["sources"][kind]
    assert 0 < row["largest_gb"] <= row["source_gb"] and row["disk_gb"] > 0 and row["weights_per_second"] > 0
    assert row["out_gb"] > 0 and 50 < row["memory_mb"] < 5000
    assert not any(tmp_path.iterdir())
