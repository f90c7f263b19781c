"""Headers of GGUF: what the package `gguf` reads in them, and that no byte of them is trusted."""

from __future__ import annotations

import math
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import ModelError
from tests.tools.quantize.sources.gguf_bytes import (
    ARRAY,
    TEXT,
    UINT32,
    array,
    file,
    key,
    number,
    tensor,
    text,
)
from tools.quantize.sources import gguf_header
from tools.quantize.sources.gguf_header import MAX_HEADER_BYTES, read_gguf

VALUES: dict[str, Any] = {
    "a.text": "zwölf 🦊", "a.empty": "", "a.bool": True, "a.int": 7, "a.float": 0.5, "a.list": [1, 2, 3],
    "a.texts": ["x", "", "yz"], "a.floats": [1.5, -2.0], "a.bools": [True, False],
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.gguf"


@pytest.mark.parametrize("alignment", [None, 8, 256])
@pytest.mark.parametrize("version", [2, 3])
def test_what_the_package_writes(path: Path, alignment: int | None, version: int) -> None:
    out = gguf.GGUFWriter(path, "llama")
    if alignment:
        out.add_custom_alignment(alignment)
    for name, value in VALUES.items():
        out.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    arrays = {"one": np.arange(5, dtype=np.float32), "two": np.ones((3, 4, 2), np.float16)}
    for name, values in arrays.items():
        out.add_tensor(name, values)
    out.add_tensor("packed", np.zeros((2, 3, 34), np.uint8), raw_dtype=Type.Q8_0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    data = bytearray(path.read_bytes())
    data[4] = version
    path.write_bytes(data)
    header = read_gguf(path)
    assert {name: header.keys[name] for name in VALUES} == VALUES
    assert [*header.tensors] == ["one", "two", "packed"]
    by_name = {each.name: each for each in gguf.GGUFReader(path).tensors}
    for name, found in header.tensors.items():
        theirs = by_name[name]
        assert found.shape == tuple(int(size) for size in reversed(theirs.shape))
        assert (found.offset, found.bytes) == (theirs.data_offset, theirs.n_bytes)
        assert found.kind.name == theirs.tensor_type.name


def test_every_type_of_value(path: Path) -> None:
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    keys = [key(f"k{kind}", kind, struct.pack("<" + code, 5)) for kind, code in codes.items()]
    nested = array(ARRAY, 2, array(TEXT, 2, text("a") + text("b")) + array(7, 2, b"\1\0"))
    path.write_bytes(file([*keys, key("nested", ARRAY, nested)]))
    found = read_gguf(path).keys
    assert {name: value for name, value in found.items() if name != "nested"} == {
        f"k{kind}": 5 for kind in codes
    }
    assert found["nested"] == [["a", "b"], [True, False]]


HUGE, MORE = 1 << 62, (1 << 64) - 1
ALIGNED = [tensor("a", [8]), tensor("b", [8], offset=32)]
DAMAGED = "; the file is damaged"
AGAIN = "; it is cut short or damaged; download it again"
REFUSED: list[tuple[bytes, str]] = [
    (b"", ": not a GGUF file (0 bytes, of which the first are b'')"),
    (b"GGUF", ": not a GGUF file (4 bytes, of which the first are b'GGUF')"),
    (b"ggjt\3\0\0\0" + bytes(50),
     ": not a GGUF file (58 bytes, of which the first are b'ggjt\\x03\\x00\\x00\\x00')"),
    (b"version https://git-lfs", ": a Git LFS pointer (23 bytes), not the file; run git lfs pull"),
    (file(version=1), ": GGUF of version 1; take a file of version 2 or 3"),
    (file(version=4), ": GGUF of version 4; take a file of version 2 or 3"),
    (file(version=0), ": GGUF of version 0; take a file of version 2 or 3"),
    (file(version=3 << 24), ": a big-endian GGUF file; take one for little-endian machines"),
    (file()[:20], f": 20 bytes, and its header needs 24{AGAIN}"),
    (file(counts=(1 << 40, 0)), f": promises {1 << 40} tensors (limit 65536){DAMAGED}"),
    (file(counts=(0, MORE)), f": promises {MORE} keys (limit 16384){DAMAGED}"),
    (file(counts=(0, 9)), f": 32 bytes, and its header needs 36{AGAIN}"),
    (file([number("x" * 2000, 1)]), f": the name of key 0 has 2000 bytes (limit 1024){DAMAGED}"),
    (file([number(b"\xff", 1)]), f": the name of key 0 is not UTF-8{DAMAGED}"),
    (file([number("a", 1), number("a", 2)]), ": has the key 'a' twice"),
    (file([key("a", 13, bytes(8))]), f": key 'a' is of the unknown type 13{DAMAGED}"),
    (file([key("a\n", 99, bytes(8))]), f": key 'a\\n' is of the unknown type 99{DAMAGED}"),
    (file([key("a", 7, b"\2")]), f": key 'a' has the truth value 2{DAMAGED}"),
    (file([key("a", TEXT, text(b"\xc3\x28"))]), f": key 'a' is not UTF-8{DAMAGED}"),
    (file([key("a", TEXT, struct.pack("<Q", HUGE))]),
     f": key 'a' has {HUGE} bytes (limit {MAX_HEADER_BYTES}){DAMAGED}"),
    (file([key("a", TEXT, struct.pack("<Q", 1000))]), f": 64 bytes, and its header needs 1045{AGAIN}"),
    (file([key("a", ARRAY, array(13, 1, b"1"))]), ": key 'a' holds values of the unknown type 13"),
    (file([key("a", ARRAY, array(UINT32, HUGE, b""))]),
     f": key 'a' brings the values in arrays to {HUGE} (limit 2097152){DAMAGED}"),
    (file([key("a", ARRAY, array(TEXT, 1 << 20, b""))]),
     f": 64 bytes, and its header needs {49 + (8 << 20)}{AGAIN}"),
    (file([key("a", ARRAY, array(7, 3, b"\0\1\2"))]), f": key 'a' has the truth value 2{DAMAGED}"),
    (file([key("a", ARRAY, array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 1, bytes(12))))))]),
     ": key 'a' has arrays nested deeper than 4"),
    (file([number("general.alignment", 24)]),
     ": general.alignment is 24, and must be a power of two up to 1048576"),
    (file([number("general.alignment", 0)]),
     ": general.alignment is 0, and must be a power of two up to 1048576"),
    (file([number("general.alignment", 1 << 21)]),
     ": general.alignment is 2097152, and must be a power of two up to 1048576"),
    (file([key("general.alignment", TEXT, text("x"))]),
     ": general.alignment is 'x', and must be a power of two up to 1048576"),
    (file([], [tensor("a" * 1025, [1])]), f": the name of tensor 0 has 1025 bytes (limit 1024){DAMAGED}"),
    (file([], [tensor("a", [1]), tensor("a", [1])]), ": has tensor 'a' twice"),
    (file([], [tensor("a", [], dimensions=0)]), ": tensor 'a' has 0 dimensions, and must have 1 to 4"),
    (file([], [tensor("a", [1], dimensions=1 << 31)]),
     f": tensor 'a' has {1 << 31} dimensions, and must have 1 to 4"),
    (file([], [tensor("a", [4, 0])]), ": tensor 'a' has the impossible shape [4, 0]"),
    (file([], [tensor("a", [HUGE, HUGE])]), f": tensor 'a' has the impossible shape [{HUGE}, {HUGE}]"),
    (file([], [tensor("a", [32], kind=4)]),
     ": tensor 'a' is of type number 4, which the package gguf does not know; take another file"),
    (file([], [tensor("a", [32], kind=1 << 31)]),
     f": tensor 'a' is of type number {1 << 31}, which the package gguf does not know; take another file"),
    (file([], [tensor("a", [32, 33], kind=8)]),
     ": tensor 'a' is Q8_0 [32, 33], and rows of Q8_0 have multiples of 32 weights"),
    (file([], [tensor("a", [8], offset=16)], bytes(64)),
     ": tensor 'a' begins at 16, which is no multiple of the alignment 32"),
    (file([], [tensor("a", [9]), ALIGNED[1]], bytes(99)),
     ": tensor 'b' overlaps the one before it by 4 bytes"),
    (file([], [tensor("a", [8]), tensor("b", [8])], bytes(99)),
     ": tensor 'b' overlaps the one before it by 32 bytes"),
    (file([], ALIGNED, bytes(63)), " is 159 bytes, and tensor 'b' ends at 160 bytes; download it again"),
    (file([], [tensor("a", [1 << 50])]), " is 64 bytes, and tensor 'a' ends at 4.5 PB; download it again"),
    (file([], [tensor("a", [8], offset=MORE - 31)]),
     " is 64 bytes, and tensor 'a' ends at 18.4 EB; download it again"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "line"), REFUSED, ids=[line[:50] for _, line in REFUSED])
def test_refused(path: Path, data: bytes, line: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ModelError) as error:
        read_gguf(path)
    assert str(error.value) == f"{path}{line}"


def test_what_is_not_refused(path: Path) -> None:
    """Tensors in any order, and bytes between and after them, which alignment leaves."""
    path.write_bytes(file([], [tensor("b", [3], offset=64), tensor("a", [2])], bytes(100)))
    assert [(name, each.shape) for name, each in read_gguf(path).tensors.items()] == [
        ("a", (2,)),
        ("b", (3,)),
    ]


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    for wrong in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError, match="no such file"):
            read_gguf(wrong)


def test_a_long_header_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1000)
    path.write_bytes(file([key("a", TEXT, text("x" * 500)), key("b", TEXT, text("x" * 500))]))
    with pytest.raises(ModelError, match=r"its header has more than 1\.0 kB, which no model's has"):
        read_gguf(path)


def whole() -> bytes:
    """A file with keys and tensors of several types, in which every part of the format occurs."""
    keys = [
        number("general.alignment", 32), key("t", TEXT, text("abc")), key("f", 6, struct.pack("<f", 1.5)),
        key("l", ARRAY, array(TEXT, 3, text("a") + text("bc") + text(""))),
        key("n", ARRAY, array(ARRAY, 2, array(UINT32, 2, bytes(8)) + array(7, 1, b"\1"))),
    ]  # fmt: skip
    tensors = [tensor("a", [2, 64], kind=8), tensor("b", [3, 4], offset=160), tensor("c", [5], offset=224)]
    return file(keys, tensors, bytes(range(256)))


NUMBERS = st.sampled_from(
    [0, 1, 2, 31, 32, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, HUGE, 1 << 63, MORE]
)
Damage = Callable[[bytearray], None]


def overwrite(at: int, value: int, size: int) -> Damage:
    def apply(data: bytearray) -> None:
        place = at % max(len(data), 1)
        data[place : place + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    return apply


def cut(at: int, count: int) -> Damage:
    def apply(data: bytearray) -> None:
        place = at % max(len(data), 1)
        del data[place : place + count]

    return apply


def insert(at: int, extra: bytes) -> Damage:
    def apply(data: bytearray) -> None:
        place = at % max(len(data), 1)
        data[place:place] = extra

    return apply


PLACES = st.integers(0, 700)
DAMAGE = (
    st.builds(overwrite, PLACES, NUMBERS | st.integers(0, 255), st.sampled_from([1, 4, 8]))
    | st.builds(cut, PLACES, st.integers(1, 300))
    | st.builds(insert, PLACES, st.binary(max_size=40))
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DAMAGE, min_size=1, max_size=4))
def test_damage_gives_a_header_or_one_line(path: Path, damage: list[Damage]) -> None:
    data = bytearray(whole())
    for apply in damage:
        apply(data)
    path.write_bytes(data)
    try:
        header = read_gguf(path)
    except ModelError as error:
        assert str(error).isprintable() and len(str(error)) < 400 + len(str(path))
        return
    end = 0
    for each in header.tensors.values():
        assert each.bytes == math.prod(each.shape) // each.kind.weights * each.kind.bytes > 0
        assert end <= each.offset and each.offset + each.bytes <= len(data)
        end = each.offset + each.bytes


def test_every_header_cut_short_is_refused(path: Path) -> None:
    data = whole()
    for length in range(len(data) - 13):  # bytes that follow the last tensor
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            read_gguf(path)
    path.write_bytes(data)
    assert len(read_gguf(path).tensors) == 3


@pytest.mark.parametrize("kind", [0, TEXT, ARRAY])
def test_the_cost_of_what_is_promised_is_bounded(path: Path, kind: int) -> None:
    """1 MB of empty texts, or arrays, or bytes: some hundred bytes of memory for each value at most."""
    size = {0: 1, TEXT: 8, ARRAY: 12}[kind]
    count = (1 << 20) // size
    path.write_bytes(file([key("a", ARRAY, array(kind, count, bytes(count * size)))]))
    tracemalloc.start()
    begun = time.thread_time()
    try:
        read_gguf(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 * count + (8 << 20) and time.thread_time() - begun < 20
