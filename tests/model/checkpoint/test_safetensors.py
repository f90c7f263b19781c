"""Our header parser against the safetensors package, and against files that lie."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.checkpoint.safetensors import DTYPES, Header, read_header
from model.errors import ModelError


def encode(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def assert_agrees_with_package(path: Path, header: Header) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        assert header.tensors.keys() == set(file.keys())
        assert dict(header.metadata) == (file.metadata() or {})
        for name, tensor in header.tensors.items():
            theirs = file.get_slice(name)
            assert (tensor.dtype, list(tensor.shape)) == (theirs.get_dtype(), theirs.get_shape())
            if tensor.dtype in DTYPES:
                with path.open("rb") as raw:
                    raw.seek(tensor.offset)
                    data = raw.read(tensor.bytes)
                values = file.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                assert bytes(values.tolist()) == data


def test_agrees_with_the_package(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {str(dtype): torch.arange(12).reshape(3, 4).to(dtype) for dtype in DTYPES.values()}
    tensors |= {
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(2.5),
        "e5m2": torch.ones(3, dtype=torch.float8_e5m2),
        "häßlich \n": torch.ones(1),
    }
    save_file(tensors, path, metadata={"format": "pt", "ß": "é"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "ß": "é"}
    assert header.tensors["empty"].bytes == 0 and header.tensors["scalar"].shape == ()
    assert_agrees_with_package(path, header)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors") == Header({}, {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes, too short"),
        (b"1234567", "7 bytes, too short"),
        (struct.pack("<Q", 1 << 40) + b"{}", f"promise a header of {1 << 40} bytes"),
        (struct.pack("<Q", 1000) + b"{}", "10 bytes, and its header alone is 1000"),
        (b"<!DOCTYPE html><html>", "not a safetensors file"),
        (encode(b"{]"), "not valid JSON"),
        (encode(b"\xff\xfe{}"), "not valid JSON"),
        (encode(b"[" * 100_000), "not valid JSON"),
        (encode(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (encode([]), "is a list"),
        (encode(b'{"a": 1, "b": 2, "b": 3}'), "'b' twice"),
        (encode(b'{"a": {"dtype": "U8", "dtype": "U8"}}'), "'dtype' twice"),
        (encode({"__metadata__": {"a": 1}}), "__metadata__"),
        (encode({"__metadata__": []}), "__metadata__"),
        (encode({"a": 1}), "'a' is not described"),
        (encode({"a": {"dtype": "U8", "shape": [1]}}), "'a' is not described"),
        (encode({"a": entry(0, 1, dtype="Q3_K")}, b"x"), "'a' has the unknown dtype 'Q3_K'"),
        (encode({"a": entry(0, 1, dtype=["U8"])}, b"x"), "'a' has the unknown dtype"),
        (encode({"a": entry(0, 1, shape=[-1, -1])}, b"x"), "'a' has the impossible shape [-1, -1]"),
        (encode({"a": entry(0, 1, shape=[1 << 40, 1 << 40])}, b"x"), "'a' has the impossible shape"),
        (encode({"a": entry(0, 1, shape=[1] * 65)}, b"x"), "'a' has the impossible shape"),
        (encode({"a": entry(0, 1, shape=[True])}, b"x"), "'a' has the impossible shape"),
        (encode({"a": entry(0, 1, shape=[1.0])}, b"x"), "'a' has the impossible shape"),
        (encode(b'{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}'), "impossible shape [-0.0]"),
        (encode({"a": entry(1, 0, shape=[0])}, b"x"), "'a' has the impossible data_offsets [1, 0]"),
        (encode({"a": entry(-1, 0, shape=[1])}, b"x"), "'a' has the impossible data_offsets [-1, 0]"),
        (encode({"a": entry(0, 8, [3], "F32")}, bytes(8)), "'a' has 8 bytes, but F32 [3] takes 12"),
        (encode({"a": entry(0, 2), "b": entry(1, 3)}, bytes(3)), "'b' overlaps the one before it by 1 bytes"),
        (encode({"a": entry(0, 2), "b": entry(0, 2)}, bytes(2)), "'b' overlaps the one before it by 2 bytes"),
        (encode({"a": entry(0, 2), "b": entry(5, 6)}, bytes(6)), "3 bytes before tensor 'b'"),
        (encode({"a": entry(4, 6)}, bytes(6)), "4 bytes before tensor 'a'"),
        (encode({"a": entry(0, 1 << 40)}, bytes(6)), "1.1 TB; the last 1099511627770 bytes are missing"),
        (encode({"a": entry(0, 4)}, bytes(6)), "2 bytes follow the last tensor"),
    ],
)  # fmt: skip
def test_refuses(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        read_header(path)
    assert said in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_names_the_missing_file_and_the_folder_in_its_place(tmp_path: Path) -> None:
    for path in (tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(ModelError, match="no such file"):
            read_header(path)


def test_tells_how_much_of_a_truncated_file_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(500_000)}, path)
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(1_200_000)
    with pytest.raises(
        ModelError, match=f"is 1.2 MB, and its header promises 2.0 MB; the last {whole - 1_200_000} byt"
    ):
        read_header(path)


VALID = encode(
    {
        "__metadata__": {"format": "pt"},
        "a": entry(0, 8, [2], "F32"),
        "b": entry(8, 8, [0, 3], "BF16"),
        "c": entry(8, 12, [2, 2], "U8"),
    },
    bytes(range(12)),
)
SURPRISES = [
    b"0",
    b"9",
    b"-",
    b"}",
    b'"',
    b"[",
    b"\\",
    b"\x00",
    b"\xff",
    b"1e9",
    b"null",
    b"F64",
    b"BF16",
    b" ",
]


@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(VALID)), st.integers(0, 3), st.sampled_from(SURPRISES) | st.binary(max_size=3)
        ),
        max_size=3,
    ),
    cut=st.none() | st.integers(0, len(VALID)),
    adjust=st.booleans(),
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_harmless(
    tmp_path: Path, edits: list[tuple[int, int, bytes]], cut: int | None, adjust: bool
) -> None:
    """Whatever is changed: a ModelError, or a file in which the package finds the very same tensors."""
    content = VALID
    for place, removed, inserted in edits:
        content = content[:place] + inserted + content[place + removed :]
    if adjust:  # so that the header's length is right more often
        end = content.rfind(b"}") + 1
        content = struct.pack("<Q", max(end - 8, 0)) + content[8:]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content[:cut])
    try:
        header = read_header(path)
    except ModelError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert_agrees_with_package(path, header)
