"""Traces that are wrong are refused by file, line and reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.experts.trace import Header, TraceError, TraceWriter
from tools.trace.command import main
from tools.trace.read import read_trace

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
        ({"event": "bang"}, "event is 'bang', and must be one of routing, ranking, hit, "),
        ({"event": ["hit"]}, "event is ['hit'], and must be one of"),
        ({"event": "hit", "step": 0}, "hit lacks layer, expert"),
        (HIT | {"colour": 1}, "hit has the unknown 'colour'"),
        (HIT | {"expert": E}, f"hit: expert is {E}, and must be a whole number from 0 to {E - 1}"),
        (HIT | {"layer": -1}, "hit: layer is -1, and must be a whole number from 0 to 0"),
        (HIT | {"step": True}, "hit: step is True, and must be a whole number >= 0"),
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
            b'{"event": "stall", "step": 0, "layer": 0, "expert": 0, "seconds": 1e999}\n',
            "stall: seconds is inf,",
        ),
        (HIT | {"event": "stall", "seconds": 1e300}, "stall: seconds is 1e+300, and must be a number >= 0"),
        (HIT | {"event": "stall", "seconds": 10**400}, "stall: seconds is 1000"),
        (HIT | {"step": 1 << 54}, f"hit: step is {1 << 54}, and must be a whole number >= 0"),
        (HIT | {"event": "wasted", "bytes": 10**400}, "wasted: bytes is 1000"),
        (ROUTING | {"tokens": 10**400}, "routing: tokens is 1000"),
        (
            ROUTING | {"weights": [1e300, 1e300]},
            "routing: weights is [1e+300, 1e+300], and must be numbers >= 0",
        ),
        (
            {"event": "ranking", "step": 0, "layer": 0, "distance": 2, "experts": [1]},
            "ranking: distance is 2, and must be a whole number from 1 to 1",
        ),
        (b'{"event": ' + b"1" * 5000 + b"}\n", "not JSON that a trace would have: a number too long"),
        (b'{"event": "' + b"x" * (1 << 20) + b'"}\n', "a line of more than 1048576 bytes; not a trace"),
        ({"event": "\x1b[2J\n" + "x" * 10**5}, r"event is '\x1b[2J\nxx"),
        (HIT | {"\x1b[2J\n" + "x" * 10**5: 1}, r"hit has the unknown '\x1b[2J\nxx"),
        (HIT | {"expert": "\x1b[2J\n" + "x" * 10**5}, r"hit: expert is '\x1b[2J\nxx"),
        (HIT | {"event": "miss", "evicted": None, "source": "sky"}, "miss: source is 'sky', and must be"),
        (
            HIT | {"event": "copy", "kind": "gift", "bytes": 1, "seconds": 1},
            'copy: kind is \'gift\', and must be "demand", "guess", "placed" or "compute"',
        ),
        (
            HIT | {"event": "miss", "evicted": None, "source": "sky"},
            'miss: source is \'sky\', and must be "host", "file" or "compute"',
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
    assert err[:-1].isprintable() and len(err) < len(str(path)) + 250


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "not a trace: "),
        ({"version": 2}, "format version 2; this program reads version 1"),
        ({"layers": 0}, "layers is 0, and must be a whole number >= 1"),
        ({"slots": [2, 2]}, "slots is [2, 2], and must be 1 whole numbers >= 1, one for each layer"),
        ({"experts_per_token": 7}, "experts_per_token is 7, and must be at most 6, the experts"),
        ({"layers": 4097}, "layers is 4097, and must be at most 4096"),
        ({"experts": 10**9}, "experts is 1000000000, and must be at most 256"),
        ({"experts": 10**400}, "experts is 1000"),
        ({"expert_bytes": 10**400}, "expert_bytes is 1000"),
        ({"seed": 1 << 60}, f"seed is {1 << 60}, and must be a whole number >= 0"),
        ({"slots": [10**400]}, "slots is [1000"),
        ({"version": "\x1b[2J" * 10**4}, r"format version '\x1b[2J"),
        ({"berths": -1}, "berths is -1, and must be a whole number from 0 to 6"),
        ({"spare_berths": 1.5}, "spare_berths is 1.5, and must be a whole number from 0 to 0"),
        ({"policy": 1}, "policy is 1, and must be a name"),
        ({"policy": "\x1b[2J"}, r"policy is '\x1b[2J', and must be a name"),
        ({"options": []}, "options is [], and must be an object"),
        ({"options": {"a": [[[]]]}}, "options is {'a': [[[]]]}, and must be an object of plain values"),
        ({"options": {"a": 10**400}}, "options is {'a': 1000"),
        ({"extra": 1}, "the header has the unknown 'extra'"),
        ({"berths": 7}, "berths is 7, and must be a whole number from 0 to 6"),
        ({"berths": 3, "spare_berths": 4}, "spare_berths is 4, and must be a whole number from 0 to 3"),
        (
            {"berths": 1, "in_berths": [0, 1]},
            "in_berths is [0, 1], and must be different experts from 0 to 5",
        ),
        ({"berths": 3, "in_berths": [0, 0]}, "in_berths is [0, 0], and must be different experts"),
        ({"berths": 3, "in_berths": [6]}, "in_berths is [6], and must be different experts from 0 to 5"),
        ({"in_berths": None}, "in_berths is None, and must be different experts"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(HEADER | changes) + "\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:1: {reason}")


def test_the_largest_trace_that_is_read_is_summarized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All numbers as large as they may be: sums are numbers that JSON has."""
    largest = 1 << 53
    changes = {"layers": 4096, "experts": 256, "slots": [largest] * 4096, "expert_bytes": largest}
    lines = [
        HEADER | changes,
        ROUTING | {"layer": 4095, "step": largest, "tokens": largest, "weights": [largest, 0.5]},
        *[HIT | {"event": "copy", "kind": "demand", "bytes": largest, "seconds": largest}] * 3,
        *[HIT | {"event": "stall", "seconds": float(largest)}] * 3,
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["summary", str(path)]) == 0
    capsys.readouterr()
    assert main(["summary", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["bytes"]["demand"] == 3 * largest and report["seconds"]["stalled"] == 3.0 * largest


def test_a_path_that_cannot_be_one() -> None:
    for use in (read_trace, lambda path: TraceWriter.open(path, Header(1, E, 2, (2,), 1, "lru", 0, 100))):
        with pytest.raises(TraceError, match=r"'a\\x00b': embedded null byte"):
            use("a\0b")
