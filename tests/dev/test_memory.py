"""The measurement of memory over prompts, at a size that takes seconds."""

import json
import sys

import pytest

from dev import memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize(("offload", "experts"), [("never", "resident"), ("always", "offloaded")])
def test_a_row(capsys: pytest.CaptureFixture[str], offload: str, experts: str) -> None:
    words = ["--one", "--prompts", "14", "--longest", "30", "--dtypes", "bfloat16", "--offload", offload]
    assert memory.main(words) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["dtype"], row["experts"], row["prompts"]) == ("bfloat16", experts, 14)
    assert row["planned"] > 0 and row["taken"] < row["most"]
    assert row["settled"] <= row["most"] and 0 <= row["grown"] < 0.1


def test_a_row_as_text() -> None:
    sizes = {name: n << 20 for n, name in enumerate(("loaded", "settled", "most", "end", "planned", "taken"))}
    line = memory.as_text({"dtype": "float32", "experts": "resident", "prompts": 3, "grown": 0.011} | sizes)
    assert line.startswith("float32, resident, 3 prompts: loaded 0.0, settled 1.0, most 2.0, ")
    assert line.endswith("taken 5.0 MiB; grown 1.1%")
