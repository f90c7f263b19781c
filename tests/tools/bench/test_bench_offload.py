"""`tools.bench offload`: every mode decodes, and the report adds up. How fast is not a test's business."""

import json

import pytest

from runtime.engine import DEMO
from tools.bench import command as bench
from tools.bench import offload
from tools.bench.ways import LADDER


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "WARM_UP", 3)


BRIEF = ["--tokens", "2", "--repeats", "1", "--threads", "1"]


def test_all_modes_on_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["offload", str(DEMO), "--slots", "3", *BRIEF, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    bound, rows = report["bound_tokens_per_s"], {row["mode"]: row for row in report["modes"]}
    assert list(rows) == ["computing", *LADDER] and all(row["tokens_per_s"] > 0 for row in rows.values())
    assert bound == pytest.approx(1000 / max(report["computing_ms"], report["copying_ms"]))
    full = rows["full"]
    assert full["share_of_bound"] == pytest.approx(full["tokens_per_s"] / bound)
    assert 0 < full["hit_ratio"] < 1 and report["link_gb_per_s"] > 0 and rows["no cache"]["hit_ratio"] == 0
    missed = full["missed_bytes_per_token"] / report["link_gb_per_s"] / 1e6
    assert report["copying_ms"] == pytest.approx(missed)
    assert err.startswith("1 of 1: computing ")


def test_slots_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["offload", str(DEMO), "--slots", "9", *BRIEF]) == 2
    assert capsys.readouterr().err == (
        "error: slots is 9, and must be from 2, which a token uses, to 8, which a layer has\n"
    )


def test_a_link_as_slow_as_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["offload", str(DEMO), "--link-gbps", "1", "--modes", "full"]
    assert bench.main([*words, *BRIEF, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["slots"] == [4] * 8 and report["link_gb_per_s"] <= 1
    assert [row["mode"] for row in report["modes"]] == ["computing", "full"]


def test_a_mode_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["offload", str(DEMO), "--modes", "half"])
    assert "'half', and must be of full, no prefetch" in capsys.readouterr().err


def test_a_long_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """Longer than a chunk: what a layer lacks is counted, and crosses the link, once in each."""
    words = ["prefill", str(DEMO), "--slots", "3", "--tokens", "700", "--repeats", "1", "--threads", "1"]
    assert bench.main([*words, "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chunk"] == 512 and report["missing_experts_per_layer"] == 5  # of 8, all of them needed
    assert report["missed_bytes"] == report["copied_bytes"] == 2 * 8 * 5 * report["expert_bytes"]
    bound = report["bound"]
    assert bound["copying_ms"] == pytest.approx(report["missed_bytes"] / report["link_bytes_per_s"] * 1e3)
    took = 700 / report["prompt"]["tokens_per_s"] * 1e3
    assert bound["share_of_bound"] == pytest.approx(bound["bound_ms"] / took)
    assert bench.main(["prefill", str(DEMO), "--tokens", "20", "--repeats", "1", "--device", "cpu"]) == 0


def test_computing_misses_is_measured_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["offload", str(DEMO), "--misses", "auto", *BRIEF]) == 2
    assert "only dev.bench misses measures --misses" in capsys.readouterr().err
