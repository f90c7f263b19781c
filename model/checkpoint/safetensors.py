"""Reads the header of a safetensors file, and trusts nothing in it.

A file is 8 bytes with an unsigned little-endian integer N, N bytes of JSON, and the tensors' bytes:

    {"__metadata__": {"format": "pt"},
     "norm.weight": {"dtype": "BF16", "shape": [4096], "data_offsets": [0, 8192]}, ...}

Offsets count from the end of the header. The format (huggingface.co/docs/safetensors) demands that tensors
neither overlap nor leave holes. `read_header` also demands that the last one ends where the file does. So
every size and place in a `Header` is true of the file, and needs no further checks.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import ModelError, quoted

PREFIX = 8  # bytes, the header's length
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
MAX_ELEMENTS = 1 << 60
LFS = b"version "  # the first bytes of what Git leaves in place of a large file
MAX_DIMENSIONS = 64  # torch's limit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
OTHER_DTYPE_BITS = {  # known to the format, but not used here
    "C64": 64, "U64": 64, "U32": 32, "U16": 16,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
DTYPE_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | OTHER_DTYPE_BITS


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `bytes` bytes from absolute position `offset`, row-major, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What a file holds. `tensors` are in the order of their places in the file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and check it against the file's size.

    Raises `ModelError`, which names the file and the tensor, if anything in the header is wrong.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(PREFIX)
            return parse_header(path, prefix, lambda length: file.read(length), size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


def parse_header(path: Path, prefix: bytes, read: Callable[[int], bytes], file_bytes: int) -> Header:
    """Check the header of a file of `file_bytes` bytes, which begins with `prefix`. `read` is called with the
    number of bytes that the header has after it.

    Raises `ModelError` as `read_header` does.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX:
        raise ModelError(f"{path}: {file_bytes} bytes, too short for a safetensors file; download it again")
    if prefix == LFS:
        raise ModelError(f"{path}: a Git LFS pointer ({file_bytes} bytes), not the file; run git lfs pull")
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path}: not a safetensors file (its first 8 bytes promise a header of {length} bytes)"
        )
    text = read(length)
    if len(text) < length:
        raise ModelError(
            f"{path}: {file_bytes} bytes, and its header alone is {length}; "
            "it is cut short or not safetensors"
        )
    entries = parse_json(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: __metadata__ is not a map of strings")
    start = PREFIX + length
    tensors = [(name, parse_entry(path, name, entry, start)) for name, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].offset, item[1].bytes))
    check_extent(path, tensors, start, file_bytes)
    return Header(dict(tensors), metadata)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parse the header's JSON object. Raises `ModelError` if a name occurs twice, which is ambiguous."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ModelError(f"{path}: the header names {quoted(twice)} twice")
        return values

    def whole(digits: str) -> int | float:  # the reference implementation takes -0 for a fraction
        return -0.0 if digits == "-0" else int(digits)

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_int=whole)
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number too long, brackets too deep
        raise ModelError(
            f"{path}: the header is not valid JSON; the file is damaged or not safetensors"
        ) from error
    if not isinstance(entries, dict):
        raise ModelError(
            f"{path}: the header is a {type(entries).__name__}, not an object; not a safetensors file"
        )
    return entries


def parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorEntry:
    """Check one tensor's entry, and its size against its shape. Offsets count from byte `start`."""
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelError(f"{where} has the unknown dtype {quoted(dtype)}")
    if not is_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_ELEMENTS:
        raise ModelError(f"{where} has the impossible shape {quoted(shape)}")
    if not is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where} has the impossible data_offsets {quoted(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise ModelError(f"{where} has {end - begin} bytes, but {dtype} {quoted(shape)} takes {bits // 8}")
    return TensorEntry(dtype, tuple(shape), start + begin, end - begin)


def is_sizes(values: Any) -> bool:
    """Whether `values` is a list of integers from 0 to 2^60.

    >>> is_sizes([2, 0]), is_sizes([-1]), is_sizes([True]), is_sizes("ab"), is_sizes([1 << 61])
    (True, False, False, False, False)
    """
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= MAX_ELEMENTS for value in values
    )


def check_extent(path: Path, tensors: list[tuple[str, TensorEntry]], start: int, file_bytes: int) -> None:
    """Raises `ModelError` unless `tensors`, sorted by place, fill the file from byte `start` to its end."""
    end = start
    for name, entry in tensors:
        if entry.offset < end:
            raise ModelError(
                f"{path}: tensor {quoted(name)} overlaps the one before it by {end - entry.offset} bytes"
            )
        if entry.offset > end:
            raise ModelError(
                f"{path}: {entry.offset - end} bytes before tensor {quoted(name)} belong to no tensor"
            )
        end += entry.bytes
    if file_bytes < end:
        raise ModelError(
            f"{path} is {readable(file_bytes)}, and its header promises {readable(end)}; the last "
            f"{end - file_bytes} bytes are missing; download it again"
        )
    if file_bytes > end:
        raise ModelError(f"{path}: {file_bytes - end} bytes follow the last tensor; the file is damaged")


def readable(size: int) -> str:
    """A number of bytes, in units of 1000s.

    >>> readable(512), readable(999_999), readable(4_900_000_000)
    ('512 bytes', '1.0 MB', '4.9 GB')
    """
    if size < 1000:
        return f"{size} bytes"
    value, units = size / 1000, ["kB", "MB", "GB", "TB", "PB", "EB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes to read into or write from."""
    return tensor.view(-1).view(torch.uint8).numpy().data
