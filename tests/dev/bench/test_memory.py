"""The measurement of memory over prompts, at a size that takes seconds."""

import json
import sys

import pytest

from dev.bench import command as bench
from dev.bench import memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize(("offload", "experts"), [("never", "resident"), ("always", "offloaded")])
def test_a_row(capsys: pytest.CaptureFixture[str], offload: str, experts: str) -> None:
    words = ["--prompts", "14", "--longest", "30", "--dtypes", "bfloat16", "--offload", offload, "--json"]
    assert bench.main(["memory", *words]) == 0
    out, err = capsys.readouterr()
    [row] = json.loads(out)["rows"].values()
    assert (row["dtype"], row["experts"], row["prompts"]) == ("bfloat16", experts, 14)
    assert row["planned"] > 0 and row["taken"] < row["most"]
    assert row["settled"] <= row["most"] and 0 <= row["grown"] < 0.1
    assert err.startswith(f"bfloat16, {experts}, 14 prompts: loaded ")


def test_a_row_in_words() -> None:
    sizes = {name: n << 20 for n, name in enumerate(("loaded", "settled", "most", "end", "planned", "taken"))}
    row = {"dtype": "float32", "experts": "resident", "prompts": 3, "grown": 0.011}
    line = memory.describe(row | sizes)
    assert line.startswith("float32, resident, 3 prompts: loaded 0.0, settled 1.0, most 2.0, ")
    assert line.endswith("taken 5.0 MiB; grown 1.1%")
