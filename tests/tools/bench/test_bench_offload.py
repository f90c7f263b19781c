"""`tools.bench offload`: every mode decodes, and the report adds up. How fast is not a test's business."""

import json

import pytest

from runtime.engine import DEMO
from tools.bench import command as bench
from tools.bench import link, offload
from tools.bench.offload import MODES


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BUFFER", "MEMORY"):
        monkeypatch.setattr(link, name, 1 << 20)
    monkeypatch.setattr(offload, "WARM_UP", 3)


BRIEF = ["--tokens", "2", "--repeats", "1", "--threads", "1"]


def test_all_modes_on_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["offload", str(DEMO), "--slots", "3", *BRIEF, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    rates, bound = report["tokens_per_s"], report["bound_tokens_per_s"]
    assert list(rates) == ["computing", *MODES] and all(rate > 0 for rate in rates.values())
    assert sorted(report["modes"]) == sorted(MODES)
    slowest = max(report["computing_ms_per_token"], report["copying_ms_per_token"])
    assert bound == pytest.approx(1000 / slowest)
    assert report["share_of_bound"]["full"] == pytest.approx(rates["full"] / bound)
    assert 0 < report["hit_ratio"] < 1 and report["link_gb_per_s"] > 0
    assert err.startswith("1 of 1: 3 slots, own: computing ")


def test_slots_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["offload", str(DEMO), "--slots", "9", *BRIEF]) == 2
    assert capsys.readouterr().err == (
        "error: slots is 9, and must be from 2, which a token uses, to 8, which a layer has\n"
    )


def test_several_slots_and_routings(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "offload",
        str(DEMO),
        "--link-gbps",
        "1",
        "--sweep",
        "7,2,9",
        "--routing",
        "synthetic,own",
        "--modes",
        "full",
    ]
    assert bench.main([*words, *BRIEF, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["routing"], row.get("error", "")[:10]) for row in rows] == [
        ("synthetic", ""), ("own", ""), ("synthetic", ""), ("own", ""),
        ("synthetic", "slots is 9"), ("own", "slots is 9"),
    ]  # fmt: skip
    assert rows[0]["modes"]["full"]["hit_ratio"] > rows[2]["modes"]["full"]["hit_ratio"] > 0
    assert bench.main([*words, *BRIEF, "--seconds", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []  # no time for any


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
    lengths = [(row["tokens"], row["thread"]) for row in report["first_times"]]
    assert lengths == [(347, "main"), (178, "main"), (37, "main"), (347, "another")]
    assert all(row["first_ms"] > 0 and row["again_ms"] > 0 for row in report["first_times"])
    assert bench.main(["prefill", str(DEMO), "--tokens", "20", "--repeats", "1", "--device", "cpu"]) == 0
