"""What quantizing again costs, on a matrix that takes no time."""

import argparse

from dev.bench import requantize


def test_errors_add_up() -> None:
    found = requantize.run(argparse.Namespace(rows=64, columns=512, threads=1))
    assert found["programs"].keys() == requantize.PROGRAMS.keys()
    for row in found["programs"].values():
        for text in requantize.FORMATS:
            added, total = row[f"added by {text}"], row[f"all with {text}"]
            assert abs(added - row["lost"]) < total + 1e-6 and total < added + row["lost"] + 1e-6
    fine, coarse = found["programs"]["GGUF Q8_0"], found["programs"]["hqq 2g16 along outputs"]
    assert fine["lost"] < 0.01 < 0.2 < coarse["lost"]
    assert abs(fine["all with 4"] - found["direct"]["4"]) < 0.005
