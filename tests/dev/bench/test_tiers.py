"""The measurement of tiers, on a model that takes no time. How fast is not a test's business."""

import dataclasses
import json
from pathlib import Path

import pytest

from dev.bench import command as bench
from dev.bench import tiers
from runtime.engine import DEMO

BRIEF = ["--tokens", "6", "--repeats", "2", "--threads", "1", "--json"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"vocab": 2048, "hidden": 128, "heads": 2, "kv_heads": 1, "head_dim": 64, "ffn": 128}
    monkeypatch.setattr(tiers, "SHAPE", dataclasses.replace(tiers.SHAPE, layers=3, **narrow))


def test_all_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kept"
    assert bench.main(["tiers", "--folder", str(folder), *BRIEF]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    rows = {row["way"]: row for row in report["ways"]}
    assert [row["berths"] for row in rows.values()] == [0, 24, 14, 14, 7, 7] and report["same_ids"]
    assert all(row["hit_ratio"] == rows["full"]["hit_ratio"] < 1 for row in list(rows.values())[1:])
    assert rows["full"]["of_full"] == 1 and report["disk_gb_per_s"] == report["link_gb_per_s"] / 4
    reading = {way for way, row in rows.items() if row["read_mb"]}
    assert reading == {"half, naive", "quarter", "quarter, naive"}
    assert {way for way, row in rows.items() if row["written_back_mb"]} == {"half", "quarter"}
    computing = rows["resident"]["bound_ms"]
    for way, row in rows.items():
        assert row["share_of_bound"] == pytest.approx(row["bound_ms"] / 1e3 * row["tokens_per_s"])
        copying = row["missed_mb"] / report["link_gb_per_s"]
        reading_all = row["read_mb"] / report["disk_gb_per_s"]
        least = max(computing, copying)
        assert least * 0.999 <= row["bound_ms"] <= max(least, reading_all) * 1.001, way
    assert err.count("\n") == len(rows) + 2 and "\n2 of 2: resident " in err

    written = (folder / "config.json").stat().st_mtime_ns
    rates = ["--link-gbps", "0.5", "--disk-gbps", "0.25", "--slots", "2"]
    assert bench.main(["tiers", "--folder", str(folder), *rates, *BRIEF]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["link_gb_per_s"], report["disk_gb_per_s"], report["slots"]) == (0.5, 0.25, [2] * 3)
    assert (folder / "config.json").stat().st_mtime_ns == written


def test_what_it_cannot_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["tiers", "--model", str(DEMO), *BRIEF]) == 2
    assert "quantize" in capsys.readouterr().err.splitlines()[-1]
    assert bench.main(["tiers", "--folder", str(tmp_path), "--tokens", "2000"]) == 2
    assert capsys.readouterr().err == (
        "error: 5 turns of 2000 tokens do not fit the model's context of 4096; take fewer\n"
    )
    assert bench.main(["tiers", "--model", str(tmp_path), "--folder", str(tmp_path)]) == 2
    assert "--folder is for a random model" in capsys.readouterr().err
