"""The measurement of ranks, on a model that takes no time. How fast is not a test's business."""

import json
import sys
from pathlib import Path

import pytest

from dev.bench import command as bench
from dev.bench import ranks, ranks_hops
from dev.bench.random_checkpoint import random_checkpoint, shape_of_size
from dev.bench.ranks_turns import over

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
BRIEF = ["--tokens", "3", "--long", "2", "--texts", "2", "--json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_checkpoint(shape_of_size(3_000_000), tmp_path)
    return tmp_path


def check(report: dict[str, object], kind: str, rounds: int) -> None:
    """What holds however fast the machine is."""
    assert report[f"same_ids, {kind}"] is True
    rows = {(row["work"], row["way"]): row for row in report["speed"] if row["experts"] == kind}  # type: ignore
    for (work, way), row in rows.items():
        assert row["low"] <= row["tokens_per_s"] <= row["high"] and row["cpu_ms"] > 0
        if rounds == 1:
            like = rows[work, "2 threads"]["tokens_per_s"]
            assert row["of_threads"] == pytest.approx(row["tokens_per_s"] / like)
        over_ranks = way.startswith("2 ranks") and (work, "2 ranks, 1 under way") in rows
        assert (row["of_one_under_way"] is not None) is over_ranks
    memory = [row for row in report["memory"] if row["experts"] == kind]  # type: ignore[attr-defined]
    assert [row["rank"] for row in memory if row["way"] == "2 ranks"] == [0, 1]
    assert all(row["resident"] > row["anonymous"] > 0 for row in memory)


@linux
def test_half_in_slots(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks_hops, "SIZES", {8192: 5, 1 << 20: 2})
    words = ["--model", str(folder), "--kinds", "half in slots", "--rounds", "1"]
    assert bench.main(["ranks", *words, *BRIEF]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    check(report, "half in slots", 1)
    assert [row["bytes"] for row in report["hops"]] == [8192, 1 << 20]
    assert all(row["ring_low"] <= row["ring_us"] and row["gloo_us"] > 0 for row in report["hops"])
    together = [row for row in report["speed"] if row["work"] == "2 texts together"]
    assert len(together) == 3 and all(0 < row["hit_ratio"] < 1 for row in together)
    assert err.count("\n") == 2 + 2 + 3 and "\nhalf in slots, prompt of 2 chunks: 2 threads " in err


@linux
@pytest.mark.slow
def test_all_ways(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["ranks", "--model", str(folder), "--rounds", "2", "--depths", "1", "3", *BRIEF]) == 0
    report = json.loads(capsys.readouterr().out)
    for kind in ranks.KINDS:
        check(report, kind, 2)
    resident = [(row["work"], row["way"]) for row in report["speed"] if row["experts"] == "resident"]
    assert (
        resident.count(("decode one text", "1 thread")) == 1
        and ("2 texts together", "2 ranks, 3 under way") in resident
    )
    token = report["token"]
    parts = token["rank_0_ms"] + token["other_ranks_ms"] + token["passing_ms"]
    assert token["measured_ms"] == pytest.approx(parts) and 0 < token["passing_share"] < 1


def test_where_a_tokens_time_goes() -> None:
    answers = [{"seconds": 0.2, "timed": [0.1, 0.06, 0.03]}] * 3
    found = ranks.token(1_000_000, 1e9, 0.5, answers, tokens=10)
    assert (found["reading_ms"], found["predicted_ms"]) == (1.0, 1.5)
    assert found["hops_share_predicted"] == pytest.approx(1 / 3)
    assert (found["measured_ms"], found["rank_0_ms"]) == (pytest.approx(20), pytest.approx(10))
    assert (found["other_ranks_ms"], found["passing_ms"]) == (pytest.approx(9), pytest.approx(1))


def test_ratios_are_the_rounds_own() -> None:
    slow, fast = (
        [{"tokens": 8, "seconds": s} for s in (1, 2, 8)],
        [{"tokens": 8, "seconds": s} for s in (1, 1, 2)],
    )
    assert over("x", fast, slow) == {"x": 2.0, "x_low": 1.5, "x_high": 3.0}
    assert over("x", fast, None) == {"x": None, "x_low": None, "x_high": None}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--long", "100"], "the model's is 1024; take fewer"),
        (["--long", "1", "--ranks", "30"], "30 ranks are more than the model's layers (3); take fewer"),
        (["--long", "1", "--folder", "x"], "--folder is for a random model"),
    ],
)
def test_what_it_cannot_measure(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert bench.main(["ranks", "--model", str(folder), *words]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
