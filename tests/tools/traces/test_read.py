"""Traces that are wrong are refused by file, line and reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.experts.trace import TraceError
from tools.trace import main
from tools.traces.read import read_trace

E = 6
HEADER: dict[str, Any] = {
    "format": "mixtral-trace", "version": 1, "layers": 1, "experts": E, "experts_per_token": 2, "slots": [2],
    "spares": 1, "policy": "lru", "seed": 0, "expert_bytes": 100, "options": {}
}  # fmt: skip
HIT: dict[str, Any] = {"event": "hit", "step": 0, "layer": 0, "expert": 0}
ROUTING: dict[str, Any] = {
    "event": "routing", "step": 0, "layer": 0, "tokens": 1, "experts": [0, 1], "weights": None
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\n", "not UTF-8 text"),
        (b"hello\n", "not JSON: Expecting value at column 1"),
        (b"\n", "not JSON: Expecting value at column 1"),
        (b"[1]\n", "not a JSON object"),
        (b"[" * 100_000 + b"\n", "not JSON that a trace would have: nested too deep"),
        (b'{"event": "stall", "seconds": NaN}\n', "NaN is not a number"),
        ({"event": "bang"}, 'event is "bang", and must be one of routing, ranking, hit, '),
        ({"event": ["hit"]}, 'event is ["hit"], and must be one of'),
        ({"event": "hit", "step": 0}, "hit lacks layer, expert"),
        (HIT | {"colour": 1}, "hit has the unknown colour"),
        (HIT | {"expert": E}, f"hit: expert is {E}, and must be a whole number from 0 to {E - 1}"),
        (HIT | {"layer": -1}, "hit: layer is -1, and must be a whole number from 0 to 0"),
        (HIT | {"step": True}, "hit: step is true, and must be a whole number >= 0"),
        (HIT | {"step": 0.5}, "hit: step is 0.5, and must be a whole number >= 0"),
        (
            ROUTING | {"experts": [0, 0]},
            "routing: experts is [0, 0], and must be different experts",
        ),
        (ROUTING | {"experts": []}, "routing: experts is [], and must be different experts"),
        (ROUTING | {"weights": [1]}, "routing: 1 weights for 2 experts"),
        (ROUTING | {"weights": [1, -1]}, "routing: weights is [1, -1], and must be numbers >= 0, or null"),
        (ROUTING | {"tokens": 0}, "routing: tokens is 0, and must be a whole number >= 1"),
        (HIT | {"event": "stall", "seconds": 1e999}, "Infinity is not a number"),
        (
            HIT | {"event": "copy", "kind": "gift", "bytes": 1, "seconds": 1},
            'copy: kind is "gift", and must be "demand" or "guess"',
        ),
    ],
)
def test_a_wrong_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes | dict[str, Any], reason: str
) -> None:
    path = tmp_path / "t.jsonl"
    first = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
    path.write_bytes(b"".join([json.dumps(HEADER).encode(), b"\n", json.dumps(HIT).encode(), b"\n", first]))
    assert main(["summary", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}:3: {reason}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "not a trace: "),
        ({"version": 2}, "format version 2; this program reads version 1"),
        ({"layers": 0}, "layers is 0, and must be a whole number >= 1"),
        ({"slots": [2, 2]}, "slots is [2, 2], and must be 1 whole numbers >= 1, one for each layer"),
        ({"experts_per_token": 7}, "experts_per_token is 7, and must be at most 6, the experts"),
        ({"policy": 1}, "policy is 1, and must be a name"),
        ({"options": []}, "options is [], and must be an object"),
        ({"extra": 1}, "the header has the unknown extra"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(HEADER | changes) + "\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:1: {reason}")
