"""What tells a model from all others: its name, and a digest of a small part of its files.

A fine-tune has the shapes of its base, and often the same norms and gates. So the digest takes all small
tensors, and a few kilobytes from the middle of large ones, which is a few megabytes of the largest Mixtral.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from model.checkpoint.load import Checkpoint
from model.checkpoint.pieces import Piece
from model.errors import ModelError, quoted

SMALL = 1 << 18  # bytes: a gate of Mixtral-8x22B has 96 KiB
SAMPLES = 256  # of large tensors
SAMPLE_BYTES = 4096
OF_TEXTS = ("context", "bos_id", "eos_ids")  # they change no key and no value


@dataclass(frozen=True)
class Identity:
    """A model's name, for messages, and its digest, which decides."""

    name: str
    digest: str


def identify(checkpoint: Checkpoint, name: str) -> Identity:
    """The identity of the model in a checkpoint. It does not depend on how the files are named and cut.

    Raises `ModelError` if a file cannot be read.
    """
    config = {key: value for key, value in asdict(checkpoint.config).items() if key not in OF_TEXTS}
    digest = hashlib.sha256(json.dumps([config, asdict(checkpoint.formats)]).encode())
    pieces = sorted(checkpoint.layout.pieces, key=lambda piece: (piece.rows.parameter, piece.rows.start))
    for piece in pieces:
        digest.update(described(piece))
    for piece in sampled(pieces):
        digest.update(middle(piece))
    return Identity(name, digest.hexdigest())


def described(piece: Piece) -> bytes:
    return json.dumps([piece.rows.parameter, piece.rows.start, piece.rows.shape, str(piece.dtype)]).encode()


def sampled(pieces: list[Piece]) -> Iterator[Piece]:
    """All small pieces, and some of the others. Their digests choose, so that every kind of matrix and every
    part of the network is among them."""
    others = []
    for piece in pieces:
        if is_small(piece):
            yield piece
        else:
            others.append(piece)
    yield from sorted(others, key=lambda piece: hashlib.sha256(described(piece)).digest())[:SAMPLES]


def is_small(piece: Piece) -> bool:
    """Whether to read it in whole. A quantized matrix has thousands of small tensors beside it."""
    return piece.bytes <= SMALL and not piece.exact


def middle(piece: Piece) -> bytes:
    """A small piece's bytes, or those in the middle of a large one."""
    size = piece.bytes if is_small(piece) else min(piece.bytes, SAMPLE_BYTES)
    try:
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.offset + (piece.bytes - size) // 2)
            data = file.read(size)
    except OSError as error:
        raise ModelError(
            f"{piece.path}: tensor {quoted(piece.tensor)} cannot be read ({error.strerror})"
        ) from error
    if len(data) < size:
        raise ModelError(
            f"{piece.path}: ended early, in tensor {quoted(piece.tensor)}; did it change since it was opened?"
        )
    return data
