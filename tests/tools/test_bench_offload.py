"""`tools.bench offload`: every mode decodes, and the report adds up. How fast is not a test's business."""

import json

import pytest

from runtime.engine import DEMO
from tools import bench
from tools.benchmarks.offload import MODES

BRIEF = ["--tokens", "2", "--repeats", "1", "--threads", "1"]


def test_all_modes_on_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["offload", str(DEMO), "--slots", "3", *BRIEF, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    rates, bound = report["tokens_per_s"], report["bound_tokens_per_s"]
    assert list(rates) == ["resident", *MODES] and all(rate > 0 for rate in rates.values())
    slowest = max(report["computing_ms_per_token"], report["copying_ms_per_token"])
    assert bound == pytest.approx(1000 / slowest)
    assert report["share_of_bound"]["full"] == pytest.approx(rates["full"] / bound)
    assert 0 < report["hit_ratio"] < 1 and report["link_gb_per_s"] > 0
    assert err.startswith("1 of 1: resident ")


def test_slots_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["offload", str(DEMO), "--slots", "9", *BRIEF]) == 1
    assert capsys.readouterr().err == "error: --slots is 9, and must be from 2 to 8\n"
