"""Reads the header of a GGUF file, and trusts nothing in it.

A file of version 2 or 3 is, in little-endian numbers:

    "GGUF", version [uint32], count of tensors [uint64], count of keys [uint64]
    for each key     its name, a type [uint32], a value of this type
    for each tensor  its name, count of dimensions [uint32], the dimensions [uint64 each] from the innermost
                     to the outermost, a type [uint32], an offset [uint64]
    padding, and the tensors' bytes, from which offsets count

A text is its length in bytes [uint64] and UTF-8. An array is the type of its values [uint32], their count
[uint64], and the values, which may be arrays again. Tensors begin at multiples of `general.alignment`.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from model.checkpoint.safetensors import LFS, MAX_ELEMENTS, readable
from model.errors import ModelError, quoted
from tools.quantize.sources.gguf_types import Kind, kinds

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Llama 3's header has 8 MB, with 400,000 texts. No Mixtral has more than 2,000 tensors.
MAX_HEADER_BYTES = 64 << 20
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_VALUES = 1 << 21  # of all arrays together
MAX_NAME = 1 << 10  # bytes of a key, or of a tensor's name
MAX_DIMENSIONS = 4  # as in ggml
MAX_DEPTH = 4  # of arrays in arrays
MAX_ALIGNMENT = 1 << 20
ALIGNMENT = "general.alignment"
BOOL, TEXT, ARRAY = 7, 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}
LEAST = {TEXT: 8, ARRAY: 12} | {kind: struct.calcsize("<" + code) for kind, code in NUMBERS.items()}  # bytes


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: `bytes` bytes from absolute position `offset`, row-major."""

    kind: Kind
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a file holds. `tensors` are in the order of their places in the file."""

    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, and check it against the file's size.

    Raises `ModelError`, which names the file and the key or the tensor, if anything in the header is wrong.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        with path.open("rb") as file:
            reader = Reader(path, file, path.stat().st_size)
            tensors, keys = begin(reader)
            found = read_keys(reader, keys)
            return GgufHeader(found, read_tensors(reader, tensors, alignment(path, found)))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


class Reader:
    """Reads one thing after the other from the beginning of a file of `size` bytes."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = self.values = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises `ModelError` if the file has fewer."""
        self.need(count)
        data = self.file.read(count)
        if len(data) < count:
            raise ModelError(f"{self.path}: ended early, at {self.at + len(data)} bytes; did it change?")
        self.at += count
        return data

    def need(self, count: int) -> None:
        """Raises `ModelError` unless the header can have `count` bytes more."""
        if self.at + count > self.size:
            raise ModelError(
                f"{self.path}: {self.size} bytes, and its header needs {quoted(self.at + count)}; it is cut "
                "short or damaged; download it again"
            )
        if self.at + count > MAX_HEADER_BYTES:
            raise ModelError(
                f"{self.path}: its header has more than {readable(MAX_HEADER_BYTES)}, which no model's has; "
                "the file is damaged"
            )

    def number(self, code: str) -> int:
        [value] = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return int(value)

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        count = self.number("Q")
        if count > most:
            raise ModelError(f"{self.path}: {what} has {count} bytes (limit {most}); the file is damaged")
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{self.path}: {what} is not UTF-8; the file is damaged") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A value of type `kind`. An array of numbers or texts becomes a list."""
        if kind == TEXT:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what, depth + 1)
        if kind not in NUMBERS:
            raise ModelError(f"{self.path}: {what} is of the unknown type {kind}; the file is damaged")
        return self.numbers(kind, 1, what)[0]

    def array(self, what: str, depth: int) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if depth > MAX_DEPTH:
            raise ModelError(f"{self.path}: {what} has arrays nested deeper than {MAX_DEPTH}")
        if kind not in LEAST:
            raise ModelError(f"{self.path}: {what} holds values of the unknown type {kind}")
        self.values += count
        if self.values > MAX_VALUES:
            raise ModelError(
                f"{self.path}: {what} brings the values in arrays to {self.values} (limit {MAX_VALUES}); the "
                "file is damaged"
            )
        self.need(count * LEAST[kind])
        if kind in NUMBERS:
            return self.numbers(kind, count, what)
        return [self.value(kind, what, depth) for _ in range(count)]

    def numbers(self, kind: int, count: int, what: str) -> list[Any]:
        found = list(struct.unpack(f"<{count}{NUMBERS[kind]}", self.take(count * LEAST[kind])))
        if kind != BOOL:
            return found
        if wrong := [value for value in found if value > 1]:
            raise ModelError(f"{self.path}: {what} has the truth value {wrong[0]}; the file is damaged")
        return list(map(bool, found))


def begin(reader: Reader) -> tuple[int, int]:
    """The counts of tensors and of keys. Raises `ModelError` if the file is not GGUF of a known version."""
    path = reader.path
    start = reader.take(min(8, reader.size))
    if start == LFS:
        raise ModelError(f"{path}: a Git LFS pointer ({reader.size} bytes), not the file; run git lfs pull")
    if start[:4] != MAGIC or len(start) < 8:
        raise ModelError(f"{path}: not a GGUF file ({reader.size} bytes, of which the first are {start!r})")
    version = int.from_bytes(start[4:], "little")
    if version and not version & 0xFFFF:
        raise ModelError(f"{path}: a big-endian GGUF file; take one for little-endian machines")
    if version not in VERSIONS:
        raise ModelError(f"{path}: GGUF of version {version}; take a file of version 2 or 3")
    tensors, keys = reader.number("Q"), reader.number("Q")
    for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
        if count > most:
            raise ModelError(f"{path}: promises {count} {what} (limit {most}); the file is damaged")
    return tensors, keys


def read_keys(reader: Reader, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place in range(count):
        name = reader.text(f"the name of key {place}", MAX_NAME)
        value = reader.value(reader.number("I"), f"key {quoted(name)}")
        if name in found:
            raise ModelError(f"{reader.path}: has the key {quoted(name)} twice")
        found[name] = value
    return found


def alignment(path: Path, keys: Mapping[str, Any]) -> int:
    found = keys.get(ALIGNMENT, 32)
    if type(found) is not int or not 0 < found <= MAX_ALIGNMENT or found & (found - 1):
        raise ModelError(
            f"{path}: {ALIGNMENT} is {quoted(found)}, and must be a power of two up to {MAX_ALIGNMENT}"
        )
    return found


def read_tensors(reader: Reader, count: int, align: int) -> dict[str, GgufTensor]:
    """All tensors, in the order of their places. They may neither overlap nor leave the file."""
    path = reader.path
    found: dict[str, tuple[Kind, tuple[int, ...], int]] = {}
    for place in range(count):
        name = reader.text(f"the name of tensor {place}", MAX_NAME)
        if name in found:
            raise ModelError(f"{path}: has tensor {quoted(name)} twice")
        found[name] = read_tensor(reader, f"{path}: tensor {quoted(name)}", align)
    end = start = -(-reader.at // align) * align
    tensors = {}
    for name, (kind, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        size = math.prod(shape) // kind.weights * kind.bytes
        if start + offset < end:
            raise ModelError(
                f"{path}: tensor {quoted(name)} overlaps the one before it by {end - start - offset} bytes"
            )
        end = start + offset + size
        if end > reader.size:
            raise ModelError(
                f"{path} is {readable(reader.size)}, and tensor {quoted(name)} ends at {readable(end)}; "
                "download it again"
            )
        tensors[name] = GgufTensor(kind, shape, start + offset, size)
    return tensors


def read_tensor(reader: Reader, where: str, align: int) -> tuple[Kind, tuple[int, ...], int]:
    """A tensor's type, shape and offset."""
    dimensions = reader.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ModelError(f"{where} has {dimensions} dimensions, and must have 1 to {MAX_DIMENSIONS}")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    number, offset = reader.number("I"), reader.number("Q")
    if not 0 < math.prod(shape) <= MAX_ELEMENTS:
        raise ModelError(f"{where} has the impossible shape {quoted(list(shape))}")
    kind = kinds().get(number)
    if kind is None:
        raise ModelError(
            f"{where} is of type number {number}, which the package gguf does not know; take another file"
        )
    if shape[-1] % kind.weights:
        raise ModelError(
            f"{where} is {kind.name} {list(shape)}, and rows of {kind.name} have multiples of {kind.weights} "
            "weights"
        )
    if offset % align:
        raise ModelError(f"{where} begins at {offset}, which is no multiple of the alignment {align}")
    return kind, shape, offset
