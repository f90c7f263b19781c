"""Several requests at once next to llama.cpp's server: a stand-in for that, and a file that keeps turns."""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dev.bench.random_checkpoint import random_native
from dev.peers.llamacpp import command as bench
from dev.peers.llamacpp import parallel, sides
from dev.peers.llamacpp.our_service import OurService
from dev.peers.llamacpp.records import Records
from dev.peers.llamacpp.sides import OUR_SERVER, THEIR_SERVER, Side, SideError
from model.config import ModelConfig
from model.quant.formats import DEFAULT
from model.shapes import SHAPES
from runtime.errors import OptionError, RequestError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SMALL = ModelConfig(
    vocab=2048, hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=128, experts=4,
    experts_per_token=2, context=64, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
PROGRAM = Path(__file__).parent / "fake_llama_server.py"
SETTINGS = {"layers": 2, "threads": 1}


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The stand-in as a program."""
    path = tmp_path / "server"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} --home {tmp_path} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def words(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line for a small model and the stand-in."""
    monkeypatch.setitem(SHAPES, "quarter", SMALL)
    monkeypatch.setattr(sides, "THEIRS", "tests.dev.peers.fake_llamacpp")
    return [
        "parallel", "--python", sys.executable, "--shape", "quarter", "--layers", "1", "--threads", "1",
        "--folder", str(tmp_path), "--server", str(server), "--rounds", "2",
        "--prompt", "4", "--requests", "1", "2",
    ]  # fmt: skip


def result(capsys: pytest.CaptureFixture[str], words: list[str]) -> dict[str, Any]:
    assert bench.main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def failure(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert bench.main(words) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_requests_at_once(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words += ["--tokens", "6", "--ways", "theirs"]
    rows = result(capsys, words)["requests_at_once"]
    assert [(row["way"], row["at_once"]) for row in rows] == [("theirs", 1), ("theirs", 2)]
    assert all(row["each"] == pytest.approx(500) and row["over_theirs"] == 1 for row in rows)
    one, two = rows
    assert 0 < one["tokens_per_s"] < 500 and one["over_one"] == 1  # since it sleeps
    assert one["tokens_per_s"] < two["tokens_per_s"] < 1000
    lines = (tmp_path / "parallel.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines[1:]] == [0, 0, 1, 1]
    assert not running(tmp_path)

    kept = [json.loads(line) for line in lines]
    kept[1]["each"] = [3.0]  # so that it shows where the figures come from
    (tmp_path / "parallel.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept[:3]) + '{"rou')
    again = result(capsys, words)["requests_at_once"]
    assert again[0]["each"] == pytest.approx((3 + 500) / 2)
    assert bench.main([*words, "--server", "none", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["requests_at_once"] == again and "4 of 4 turns are in " in err
    elsewhere = [*words, "--server", "none", "--turns", str(tmp_path / "other.jsonl")]
    assert "--server none: there is no such program" in failure(capsys, elsewhere)
    assert "has turns of tokens 6, not 4; remove it" in failure(capsys, [*words, "--tokens", "4"])


def test_ours_and_theirs_take_turns(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for way in ("ours", "offloaded"):
        monkeypatch.setitem(parallel.WAYS, way, "tests.dev.peers.fake_service")
    words += ["--tokens", "6", "--link-gbps", "2", "--ways", "ours", "theirs", "offloaded"]
    found = result(capsys, words)
    lines = [json.loads(line) for line in (tmp_path / "parallel.jsonl").read_text().splitlines()[1:]]
    rows = {(row["way"], row["at_once"]): row for row in found["requests_at_once"]}
    assert list(rows) == [(way, count) for way in ("ours", "theirs", "offloaded") for count in (1, 2)]
    for way, speed in (("ours", 3000), ("offloaded", 1500)):
        for count in (1, 2):
            row = rows[way, count]
            assert row["tokens_per_s"] == pytest.approx(count * speed) and row["over_one"] == count
            took = [line["seconds"] for line in lines if (line["way"], line["requests"]) == ("theirs", count)]
            assert row["over_theirs"] == pytest.approx(statistics.median(took) / (6 / speed))
            assert row["cpu_ms"] == pytest.approx(1000 / count / 6) and row["copied_mb"] == pytest.approx(
                1 / count / 6
            )
    assert [line["way"] for line in lines] == ["ours", "theirs", "offloaded"] * 4
    assert found["random_choices"][1] == {"at_once": 2, "experts": 3.0, "over_one": 4 / 3}
    assert found["slots"] == 2


def test_our_service_measures_what_it_answers(tmp_path: Path) -> None:
    random_native(SMALL, tmp_path, DEFAULT)
    side = OurService()
    side.load(str(tmp_path), threads=1, parallel=3, context=24, offload="always", slots=2)
    with side.service:
        found = side.together(requests=3, prompt=4, tokens=20, seed=1)
        assert side.engine.stats().new_tokens == 60
        assert found["seconds"] > 19 / min(found["each"]) and len(found["each"]) == 3
        assert found["copied"] > 0 and 0 < found["hit_ratio"] < 1
        with pytest.raises(RequestError):
            side.together(requests=1, prompt=40, tokens=2, seed=1)


def test_our_server_answers_as_many_as_asked(tmp_path: Path) -> None:
    random_native(SMALL, tmp_path, DEFAULT)
    with Side(OUR_SERVER) as side:
        side.ask("load", path=str(tmp_path), vocab=2048, threads=1, parallel=2, context=24, offload="never")
        found = side.ask("together", requests=2, prompt=4, tokens=20, seed=1)
        assert (
            found["seconds"] > 19 / max(found["each"])
            and len(found["each"]) == 2
            and found["cpu_seconds"] > 0
        )
        with pytest.raises(SideError, match=r"answered 400: .*24"):
            side.ask("together", requests=1, prompt=40, tokens=20, seed=1)
    assert not running(tmp_path, word="runtime.serve")


def test_what_the_server_cannot_do_is_one_line(server: Path) -> None:
    given = {"server": str(server), "path": "model", "parallel": 1, "context": 64, "vocab": 2048}
    with Side(THEIR_SERVER) as side, pytest.raises(SideError, match="serves nothing: no such model"):
        side.ask("load", threads=7, **given)
    with Side(THEIR_SERVER) as side:
        assert side.ask("load", threads=1, **given)["version"] == "version: 0 (fake)"
        for tokens, reason in ((13, r'answered 400: {"error": "refused"}'), (41, "made 40 tokens of 41")):
            with pytest.raises(SideError, match=reason):
                side.ask("together", requests=1, prompt=4, tokens=tokens, seed=0)
        assert side.ask("together", requests=1, prompt=4, tokens=2, seed=0)["each"] == [pytest.approx(500)]
        assert running(server.parent, 0)
    assert not running(server.parent)


def running(folder: Path, seconds: float = 2.0, word: str = PROGRAM.name) -> list[str]:
    """Command lines with that word and of that folder, of processes that do not end in time."""
    end = time.monotonic() + seconds
    while True:
        found = []
        for process in filter(str.isdecimal, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{process}/cmdline").read_text()
            except OSError:
                continue
            if str(folder) in words and word in words:
                found.append(words)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.02)


def test_a_file_of_turns(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    Records(path, SETTINGS).add((0, 2, "theirs"), {"seconds": 1.5})
    whole = path.read_text()
    for cut in range(len(whole) + 1):
        path.write_text(whole[:cut])
        records = Records(path, SETTINGS)
        records.add((1, 1, "ours"), {"seconds": 2.0})
        expected = {(1, 1, "ours"): {"seconds": 2.0}}
        if cut == len(whole):
            expected[0, 2, "theirs"] = {"seconds": 1.5}
        assert Records(path, SETTINGS).turns == expected
    with pytest.raises(OptionError, match=r"has turns of threads 1, not 2; remove it"):
        Records(path, SETTINGS | {"threads": 2})
    for text in ("words\n", "[]\n", '{"layers": 2, "threads": 1}\n{"round": 1}\n'):
        path.write_text(text)
        with pytest.raises(OptionError, match="is no file of turns"):
            Records(path, SETTINGS)
        assert path.read_text() == text
