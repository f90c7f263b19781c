"""The flags of offloading on the command line: same text, a plan, statistics, a trace; and their refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.generate import main

WORDS = ["--device", "cpu", "--dtype", "float32", "--prompt", "def alpha_", "--max-new-tokens", "12",
         "--seed", "4", "--ignore-eos"]  # fmt: skip

Outcome = tuple[int | str | None, str, str]


@pytest.fixture
def run(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*words: object) -> Outcome:
        try:
            status: int | str | None = main(["--model", str(checkpoint), *WORDS, *map(str, words)])
        except SystemExit as exit:
            status = exit.code
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


def test_the_text_is_the_same(run: Callable[..., Outcome]) -> None:
    status, text, _ = run()
    assert status == 0 and text
    for words in (
        ("--offload", "always"),
        ("--slots", 2, "--policy", "lfu"),
        ("--slots", 3, "--policy", "random", "--lookahead", 0),
        ("--slots", 2, "--policy", "static", "--lookahead", 2, "--prefetch", 2, "--link-gbps", 0.5),
    ):
        assert run(*words)[:2] == (0, text)


def test_plan_and_statistics(run: Callable[..., Outcome], tmp_path: Path) -> None:
    status, _, err = run("--slots", 2, "--stats-file", tmp_path / "stats.json")
    assert status == 0 and "\nslots: 2 in each of 2 layers; 1 spare" in err and "hit ratio 0." in err
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["hits"] > 0 and stats["misses"] > 0 and 0 < stats["hit_ratio"] < 1
    assert stats["hit_ratio"] == stats["hits"] / (stats["hits"] + stats["misses"])
    assert 0 <= stats["lookahead_recall"] <= 1 and stats["copied_bytes"] >= stats["wasted_bytes"] >= 0
    assert stats["stall_seconds"] >= 0 and stats["plan"]["slots_per_layer"] == [2, 2]
    _, _, err = run("--slots", 2, "--stats", "json", "--quiet")
    assert json.loads(err.splitlines()[-1])["misses"] == stats["misses"]  # whatever copies did
    status, _, err = run("--slots", 2, "--dry-run")
    assert status == 0 and "\nslots: 2 in each of 2 layers" in err


def test_a_trace_is_one_line_of_json_per_event(run: Callable[..., Outcome], tmp_path: Path) -> None:
    file = tmp_path / "run.trace"
    stats = tmp_path / "stats.json"
    status, text, _ = run("--slots", 2, "--trace", file, "--stats-file", stats, "--policy", "lfu")
    assert status == 0 and text == run()[1]
    header, *events = map(json.loads, file.read_text().splitlines())
    assert (header["format"], header["policy"], header["slots"]) == ("mixtral-trace", "lfu", [2, 2])
    counted = json.loads(stats.read_text())
    for kind, name in (("hit", "hits"), ("miss", "misses"), ("guess", "guesses"), ("used", "used_guesses")):
        assert sum(event["event"] == kind for event in events) == counted[name]
    assert sum(event["event"] == "routing" for event in events) == 2 * 12


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--trace", "x"], 2, "nothing to trace; use --offload always"),
        (["--slots", "1"], 2, "slots is 1, and must be from 2"),
        (["--slots", "5"], 2, "to 4, which a layer has"),
        (["--slots", "2", "--offload", "never"], 2, "leave one of them out"),
        (["--policy", "fifo"], 2, "argument --policy"),
        (["--lookahead", "3"], 2, "lookahead is 3"),
        (["--link-gbps", "0"], 2, "link_gbps is 0.0"),
        (["--slots", "2", "--trace", "no/such/folder"], 1, "no/such/folder: No such file or directory"),
    ],
)
def test_refusals(run: Callable[..., Outcome], words: list[str], status: int, message: str) -> None:
    found, out, err = run(*words)
    assert (found, out) == (status, "") and message in err.splitlines()[-1]
