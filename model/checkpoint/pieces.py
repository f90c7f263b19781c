"""Compares headers with tables. A checkpoint is refused unless every tensor of its files is accounted for.

The result is a list of byte ranges, each with the rows of a parameter that it fills. Loading needs no more.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from model.checkpoint.files import some
from model.checkpoint.names import IGNORED, SPELLINGS, Rows, Table, stored_tensors
from model.checkpoint.safetensors import DTYPES, Header, TensorEntry
from model.config import ModelConfig
from model.errors import ModelError, quoted
from model.parameters import EMBEDDINGS, HEAD, copies
from model.part import Part

WEIGHT_DTYPES = ("BF16", "F16", "F32")
MANY = 1000  # tensors; more than twice the files' tensors and these means another model's configuration


@dataclass(frozen=True)
class Piece:
    """Bytes of a file, from `offset` on, that fill `rows`. They belong to `tensor`, which messages name.

    Bytes that are `exact` have a meaning in their own dtype only, and are never converted.
    """

    path: Path
    tensor: str
    offset: int
    dtype: torch.dtype
    rows: Rows
    exact: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.rows.shape) * self.dtype.itemsize

    def split(self, limit: int) -> list["Piece"]:
        """Cut the piece into smaller ones of up to `limit` bytes, or of one row if that is larger. A head
        whose rows are interleaved stays whole.

        >>> whole = Piece(Path("f"), "t", 100, torch.float32, Rows("p", 8, (5, 4)))
        >>> [(piece.offset, piece.rows.start, piece.rows.shape) for piece in whole.split(2 * 16)]
        [(100, 8, (2, 4)), (132, 10, (2, 4)), (164, 12, (1, 4))]
        """
        total, *row = self.rows.shape
        row_bytes = math.prod(row) * self.dtype.itemsize
        unit = self.rows.head_dim or 1
        stride = max(limit // (row_bytes * unit), 1) * unit
        return [
            dataclasses.replace(
                self,
                offset=self.offset + first * row_bytes,
                rows=dataclasses.replace(
                    self.rows, start=self.rows.start + first, shape=(min(stride, total - first), *row)
                ),
            )
            for first in range(0, total, stride)
        ]


@dataclass(frozen=True)
class Layout:
    """A whole checkpoint: its spelling's name, and its pieces in the order of the files and their bytes."""

    spelling: str
    pieces: tuple[Piece, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of all parameters; each of their rows is filled exactly once
    places: Mapping[str, tuple[int, ...]]  # indices into `pieces` of those that fill a parameter

    @staticmethod
    def of(spelling: str, pieces: Iterable[Piece], files: Iterable[Path]) -> "Layout":
        """Sort pieces that come in any order. `files` are all files, in order."""
        order = {path: place for place, path in enumerate(files)}
        ordered = tuple(sorted(pieces, key=lambda piece: (order[piece.path], piece.offset)))
        places: dict[str, list[int]] = {}
        for place, piece in enumerate(ordered):
            places.setdefault(piece.rows.parameter, []).append(place)
        shapes = coverage(piece.rows for piece in ordered)
        return Layout(spelling, ordered, shapes, {name: tuple(of) for name, of in places.items()})

    def part(self, part: Part) -> "Layout":
        """The pieces of some layers, whose parameters have the names that the part gives them."""
        names = {name: part.own_name(name) for name in self.shapes}
        pieces = [
            dataclasses.replace(piece, rows=dataclasses.replace(piece.rows, parameter=own))
            for piece in self.pieces
            if (own := names[piece.rows.parameter]) is not None
        ]
        return Layout.of(self.spelling, pieces, dict.fromkeys(piece.path for piece in pieces))

    def filling(self, parameters: Iterable[str]) -> list[Piece]:
        """The pieces that fill these parameters, in the order of the files and their bytes."""
        return [self.pieces[place] for place in sorted(i for name in parameters for i in self.places[name])]


def match(folder: Path, headers: Mapping[Path, Header], config: ModelConfig, tied: bool = False) -> Layout:
    """The layout of the checkpoint in `folder`, whose files have these headers.

    If embeddings and head are `tied` and the files have one of them, its bytes fill both.

    Raises `ModelError`, which names the tensors, if some are missing, unexpected, in two files, or of the
    wrong shape or dtype.
    """
    found = collect(folder, headers)
    spelling = recognize(found)
    table = SPELLINGS[spelling]
    if tied:
        tie(found, table)
    count = sum(copies(source, config) for sources in table.values() for source in sources)
    check_count(folder, config, count, len(found))
    expected = stored_tensors(table, config)
    (head,) = table[HEAD]
    if {*expected} - {*found} == {head}:
        raise ModelError(
            f"{folder}: no tensor {quoted(head)}, and config.json does not say that the embeddings "
            "take its place (tie_word_embeddings); the files are incomplete or belong to another "
            "configuration"
        )
    check_names(folder, expected, found)
    pieces = []
    for name, stored in expected.items():
        path, entry = found[name]
        check_tensor(
            path, name, entry, stored.shape, WEIGHT_DTYPES, "start from the 16-bit checkpoint instead"
        )
        offset = entry.offset
        for rows in stored.fills:
            piece = Piece(path, name, offset, DTYPES[entry.dtype], rows)
            pieces.append(piece)
            offset += piece.bytes
        assert offset == entry.offset + entry.bytes, name
    return Layout.of(spelling, pieces, headers)


def tie(found: dict[str, tuple[Path, TensorEntry]], table: Table) -> None:
    """Let the embeddings' tensor be the head's, too, or the other way round, if only one is there.

    If both are, they may differ, and each is what it is: Transformers does the same.
    """
    (embeddings,), (head,) = table[EMBEDDINGS], table[HEAD]
    for one, other in ((embeddings, head), (head, embeddings)):
        if one in found:
            found.setdefault(other, found[one])


def check_count(folder: Path, config: ModelConfig, expected: int, found: int) -> None:
    """Raises `ModelError` if a configuration claims far more tensors than there are.

    Comparing names takes time and memory for each, and a configuration of 500 bytes can claim millions.
    """
    if expected > 2 * found + MANY:
        raise ModelError(
            f"{folder}: holds {found} tensors, and the configuration's {config.layers} layers of "
            f"{config.experts} experts are {expected}; the files are incomplete or belong to another "
            "configuration"
        )


def collect(folder: Path, headers: Mapping[Path, Header]) -> dict[str, tuple[Path, TensorEntry]]:
    """All tensors of all files, by name. Raises `ModelError` if a tensor is in two files."""
    found: dict[str, tuple[Path, TensorEntry]] = {}
    for path, header in headers.items():
        for name, entry in header.tensors.items():
            if name in found:
                raise ModelError(
                    f"{folder}: tensor {quoted(name)} is in {found[name][0].name} and again in {path.name}"
                )
            if not name.endswith(IGNORED):
                found[name] = (path, entry)
    return found


def recognize(names: Iterable[str], spellings: Mapping[str, Table] = SPELLINGS) -> str:
    """The spelling that has most of these names, judged by the first layer and its first expert."""
    present = set(names)

    def shared(table: Table) -> int:
        return sum(source.format(n=0, e=0) in present for sources in table.values() for source in sources)

    return max(spellings, key=lambda spelling: shared(spellings[spelling]))


def check_names(folder: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises `ModelError`, which lists the names, if some are missing or do not belong."""
    present, wanted = set(found), set(expected)
    missing = [name for name in expected if name not in present]
    unexpected = [name for name in found if name not in wanted]
    faults = [
        f"{len(names)} tensor{'s' * (len(names) > 1)} {what} ({some(names)})"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"))
        if names
    ]
    if faults:
        raise ModelError(
            f"{folder}: {'; '.join(faults)}; the files are incomplete or belong to another configuration"
        )


def check_tensor(
    path: Path, name: str, entry: TensorEntry, shape: tuple[int, ...], dtypes: tuple[str, ...], remedy: str
) -> None:
    """Raises `ModelError` if the tensor has another shape, or a dtype that is not in `dtypes`."""
    if entry.shape != shape:
        raise ModelError(
            f"{path}: tensor {quoted(name)} has shape {quoted(list(entry.shape))}, "
            f"and must have {list(shape)}"
        )
    if entry.dtype not in dtypes:
        what = "weights" if dtypes == WEIGHT_DTYPES else "it"
        wanted = ", ".join(dtypes)
        raise ModelError(
            f"{path}: tensor {quoted(name)} is {entry.dtype}, and {what} must be {wanted}; {remedy}"
        )


def coverage(fills: Iterable[Rows]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that these rows make up. Every row has to occur exactly once.

    >>> coverage([Rows("p", 3, (2, 4)), Rows("p", 0, (3, 4))])
    {'p': (5, 4)}
    """
    by_parameter: dict[str, list[Rows]] = {}
    for rows in fills:
        by_parameter.setdefault(rows.parameter, []).append(rows)
    shapes = {}
    for parameter, parts in by_parameter.items():
        parts.sort(key=lambda rows: rows.start)
        end = 0
        for rows in parts:
            assert rows.start == end, f"{parameter}: row {end} is followed by row {rows.start}"
            end += rows.shape[0]
        shapes[parameter] = (end, *parts[0].shape[1:])
    return shapes
