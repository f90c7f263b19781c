"""The measurement of memory over prompts, at a size that takes seconds."""

import json
import sys

import pytest

from dev.bench import command as bench
from dev.bench import memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize(("offload", "experts"), [("never", "resident"), ("always", "offloaded")])
def test_a_way(capsys: pytest.CaptureFixture[str], offload: str, experts: str) -> None:
    words = ["--prompts", "14", "--longest", "30", "--dtypes", "bfloat16", "--offload", offload, "--json"]
    assert bench.main(["memory", *words]) == 0
    out, err = capsys.readouterr()
    ways = json.loads(out)["ways"]
    assert all(name.startswith(f"bfloat16, {experts}") for name in ways)
    for way in ways.values():
        assert [row["moment"] for row in way["moments"]] == ["loaded", "all experts used", "14 prompts"]
        assert way["planned"] > 0 and 0 <= way["grown"] < 0.1
        for row in way["moments"]:
            assert row["over_files"] == pytest.approx((row["anonymous"] + row["mapped"]) / way["files"])
        assert 0 < way["second_private"] < 2 * way["moments"][1]["pss"]
    assert err.count("\n") == len(ways) and ", 14 prompts: " in err


def test_sizes_are_over_what_there_was_before() -> None:
    before = {"rss": 10_000_000, "anonymous": 6_000_000, "mapped": 4_000_000, "pss": 7_000_000}
    size = {"rss": 30_000_000, "anonymous": 16_000_000, "mapped": 14_000_000, "pss": 22_000_000}
    assert memory.describe("loaded", size, before, files=40_000_000) == {
        "moment": "loaded", "anonymous": 10.0, "mapped": 10.0, "pss": 15.0, "over_files": 0.5,
    }  # fmt: skip
