"""The comparison with llama.cpp: our side as it is, and a stand-in for theirs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dev.peers.llamacpp import command as bench
from dev.peers.llamacpp import group, sides, speed
from dev.peers.llamacpp.sides import SideError, their_side
from dev.peers.llamacpp.turns import Turns, quartiles
from model.config import ModelConfig
from model.shapes import SHAPES
from runtime.errors import DeviceError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SMALL = ModelConfig(
    vocab=2048, hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=128, experts=4,
    experts_per_token=2, context=64, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
WORDS = ["--python", sys.executable, "--shape", "quarter", "--threads", "1", "--rounds", "2"]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "quarter", SMALL)
    monkeypatch.setattr(sides, "THEIRS", "tests.dev.peers.fake_llamacpp")
    monkeypatch.setattr(speed, "read_bandwidth", lambda threads: 1e6)


def result(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert bench.main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert bench.main(list(words)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["speed", *WORDS, "--layers", "2", "--folder", str(tmp_path / "models")]
    found = result(capsys, *words, "--prompts", "8", "16", "--tokens", "2")
    assert [row["work"] for row in found["tokens_per_s"]] == ["decode", "prompt 8", "prompt 16"]
    for row in found["tokens_per_s"]:
        assert row["ours"] > 0 and 0 < row["low"] <= row["ratio"] <= row["high"]
    ratios = [row["equal_work"] / row["ratio"] for row in found["tokens_per_s"]]
    attention, experts = 64 * (64 + 2 * 32 + 64), 2 * 3 * 64 * 128
    assert ratios == pytest.approx([1, *[2 * (attention + experts) / (2 * attention + experts)] * 2])
    decode, _, prompt = found["tokens_per_s"]
    assert 0 < decode["theirs"] < 1000 and 0 < prompt["theirs"] < 10_000  # since it sleeps
    ours, theirs = found["weights_of_a_token"]
    assert theirs["mb"] == 500 / 1e6 < ours["mb"]
    assert theirs["share_of_bandwidth"] == pytest.approx(500 * decode["theirs"] / 1e6)
    assert found["model"] == "quarter, 2 layers, random"
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "quarter-2-attention-4-experts-4-head-8", "quarter-2-q4_0-head-q6_k.gguf",
    ]  # fmt: skip


def test_products(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "product", *WORDS, "--rows", "1", "3")
    rows = [(row["matrix"], row["rows"]) for row in found["ms_per_product"]]
    assert rows == [("128 x 64", 1), ("128 x 64", 3), ("64 x 128", 1), ("64 x 128", 3)]
    assert all(row["ours"] > 0 and row["theirs"] >= 1 / 8 for row in found["ms_per_product"])
    assert found["theirs"].startswith("q4_0 in FAKE")


def test_what_a_side_cannot_do_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["speed", *WORDS, "--layers", "1", "--folder", str(tmp_path)]
    assert "fake_llamacpp: ValueError: no such quant" in failure(capsys, *words, "--quant", "q2_k")
    line = failure(capsys, "product", *WORDS, "--rows", "13")
    assert line.endswith("ended with status 3, asked to batch")
    line = failure(capsys, "product", *WORDS[2:], "--python", str(tmp_path / "none"))
    assert line.endswith("none cannot be started (No such file or directory)")


def test_an_environment_without_llamacpp_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "THEIRS", "dev.peers.no_such_module")
    with pytest.raises(SideError, match=r"ended with status 1, asked to check; pip install llama-cpp-python"):
        their_side(sys.executable)


def test_without_a_group_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(group, "groups", lambda root, hierarchy: iter([tmp_path / "group"]))
    (tmp_path / "group").mkdir()  # an ordinary folder has no limit to set
    line = failure(capsys, "limited", *WORDS, "--layers", "1", "--folder", str(tmp_path / "models"))
    assert "can be made" in line and "No such file or directory" in line and "run this as root" in line
    assert list((tmp_path / "group").iterdir()) == []
    monkeypatch.setattr(group, "groups", lambda root, hierarchy: iter(()))
    with pytest.raises(DeviceError, match=r"no group of 1.0 GiB can be made \(no hierarchy is mounted\)"):
        group.make_group(1 << 30)


def test_ratios_are_of_turns_and_above_1_where_we_are_faster() -> None:
    ours, theirs = [1.0, 10.0, 2.0], [2.0, 30.0, 8.0]
    turns = Turns(*([{"seconds": s, "cpu_seconds": 2 * s} for s in side] for side in (ours, theirs)))
    found = turns.compare(4)
    assert (found["ratio"], found["low"], found["high"], found["cpu_ratio"]) == (3.0, 2.5, 3.5, 3.0)
    assert (found["our_cpu_ms"], found["their_cpu_ms"]) == (1000.0, 4000.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
