"""The measurement of missed experts, on a model that takes no time. How fast is not a test's business."""

import dataclasses
import json

import pytest

from dev.bench import command as bench
from dev.bench import misses, tiers

BRIEF = ["--tokens", "6", "--repeats", "2", "--json"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"vocab": 2048, "hidden": 128, "heads": 2, "kv_heads": 1, "head_dim": 64, "ffn": 128}
    monkeypatch.setattr(tiers, "SHAPE", dataclasses.replace(tiers.SHAPE, layers=3, **narrow))
    monkeypatch.setattr(misses, "ALONE", 0.01)
    monkeypatch.setattr("runtime.experts.rates.SECONDS", 0.02)


def test_all_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["misses", *BRIEF]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    links = [(row["link"], row["way"]) for row in report["ways"]]
    assert links == [(f"1/{n}", way) for n in (2, 4, 8) for way in misses.WAYS] and report["slots"] == [4] * 3
    assert report["together_gb_per_s"] > 0
    for link in ("1/2", "1/4", "1/8"):
        rows = {row["way"]: row for row in report["ways"] if row["link"] == link}
        better = max(rows["copy"]["tokens_per_s"], rows["compute"]["tokens_per_s"])
        for row in rows.values():
            assert row["share_of_bound"] == pytest.approx(row["bound_ms"] / 1e3 * row["tokens_per_s"])
            assert row["of_better"] == pytest.approx(row["tokens_per_s"] / better)
        assert rows["copy"]["computed"] == 0 and rows["compute"]["computed"] > 0
    differences = report["differences"]
    assert differences["copy"] == 0 and 0 < differences["compute"] < 2 and 0 < differences["auto"] < 2
    assert err.count("\n") == 6 and "\n1/2, 2 of 2: copy " in err


def test_too_long_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["misses", "--tokens", "2000"]) == 2
    assert "5 turns of 2000 tokens do not fit the model's context of 4096" in capsys.readouterr().err
