"""From files into a model: one pass over the bytes, each read once, to where it stays.

Weights that are on the CPU in the dtype of the file are read into their own memory. All others go through a
few buffers of `CHUNK_BYTES`, and are converted from there. Plain reads, no memory maps: what the process is
charged for is the model and these buffers. Two readers take turns, so that one converts, or takes page
faults, while the other reads.
"""

import queue
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.files import check_folder, weight_files
from model.checkpoint.layout import Layout, Piece, match
from model.checkpoint.safetensors import byte_view, read_header, readable
from model.config import ModelConfig
from model.errors import ModelError
from model.mixtral import Mixtral

CHUNK_BYTES = 16 << 20
READERS = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and checked, and whose weights have not been touched yet."""

    folder: Path
    config: ModelConfig
    layout: Layout
    files: int

    @property
    def bytes(self) -> int:
        """What there is to read: the sum of what `progress` will be told."""
        return sum(piece.bytes for piece in self.layout.pieces)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most bytes are stored in."""
        sizes: Counter[torch.dtype] = Counter()
        for piece in self.layout.pieces:
            sizes[piece.dtype] += piece.bytes
        return sizes.most_common(1)[0][0]

    @property
    def description(self) -> str:
        """For people: `HF, 19 files, bfloat16, 93.4 GB`."""
        files = f"{self.files} file{'s' * (self.files > 1)}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.layout.spelling}, {files}, {dtype}, {readable(self.bytes)}"

    def load(self, model: Mixtral, progress: Callable[[int], None] | None = None) -> None:
        """Fill every parameter of `model`, which has this configuration, in its own dtype and on its device.

        `progress` is called from this thread with the bytes read since the last call. Raises `ModelError` if
        a file cannot be read or is no longer what its header said; the model's weights are then undefined.
        """
        self.fill(dict(model.named_parameters()), progress)

    def fill(self, parameters: Mapping[str, Tensor], progress: Callable[[int], None] | None = None) -> None:
        """As `load`, into tensors by the names and shapes of Mixtral's parameters, wherever they are kept."""
        check_parameters(self.folder, parameters, self.layout.shapes)
        pinned = any(tensor.is_cuda for tensor in parameters.values())
        largest = max(chunk.bytes for piece in self.layout.pieces for chunk in piece.split(CHUNK_BYTES))
        buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(READERS):
            buffers.put(torch.empty(largest, dtype=torch.uint8, pin_memory=pinned))

        def read(chunk: Piece) -> int:
            buffer = buffers.get()
            try:
                read_piece(chunk, parameters[chunk.rows.parameter], buffer)
            finally:
                buffers.put(buffer)
            return chunk.bytes

        pool = ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint")
        try:
            chunks = (chunk for piece in self.layout.pieces for chunk in piece.split(CHUNK_BYTES))
            for size in pool.map(read, chunks):
                if progress:
                    progress(size)
        finally:  # an error, or Ctrl-C: what has not begun is dropped
            pool.shutdown(cancel_futures=True)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find and check a checkpoint: configuration, files, headers, names, shapes and dtypes. No weights yet.

    Raises `ModelError`, one line that names what is wrong.
    """
    try:
        check_folder(folder)
        config = ModelConfig.read(folder)
        files = weight_files(folder)
        layout = match(folder, {path: read_header(path) for path in files}, config)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror})") from error
    return Checkpoint(folder, config, layout, len(files))


def check_parameters(
    folder: Path, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `ModelError` unless the parameters are exactly those that the checkpoint fills."""
    for name in parameters.keys() ^ shapes.keys():
        raise ModelError(
            f"{folder}: parameter {name!r} is only in the {'model' if name in parameters else 'checkpoint'}"
        )
    for name, shape in shapes.items():
        given = tuple(parameters[name].shape)
        if given != shape:
            raise ModelError(f"{folder}: parameter {name!r} is {list(shape)}, and {list(given)} in the model")


@torch.inference_mode()
def read_piece(piece: Piece, parameter: Tensor, buffer: Tensor) -> None:
    """Read one piece into its rows of the parameter, by way of `buffer` (bytes) where they differ in kind."""
    rows = parameter[piece.rows.start : piece.rows.start + piece.rows.shape[0]]
    in_place = rows.device.type == "cpu" and rows.dtype == piece.dtype and rows.is_contiguous()
    if in_place and not piece.rows.head_dim:
        read_bytes(piece, rows)
        return
    raw = buffer[: piece.bytes]
    read_bytes(piece, raw)
    values = raw.view(piece.dtype).view(piece.rows.shape)
    if piece.rows.head_dim:
        values = rotate_half_order(values, piece.rows.head_dim)
    rows.copy_(values)


def read_bytes(piece: Piece, tensor: Tensor) -> None:
    """Read a piece's bytes into the memory of a contiguous tensor of that size, on the CPU."""
    memory = byte_view(tensor)
    try:
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.offset)
            while memory and (count := file.readinto(memory)):
                memory = memory[count:]
    except OSError as error:
        raise ModelError(
            f"{piece.path}: tensor {piece.tensor!r} cannot be read ({error.strerror})"
        ) from error
    if memory:
        raise ModelError(
            f"{piece.path}: ended {len(memory)} bytes early, in tensor {piece.tensor!r}; did it change?"
        )


def rotate_half_order(rows: Tensor, head_dim: int) -> Tensor:  # [heads * K, D] -> the same
    """Rows of q or k, from Mistral's interleaved order to the rotate-half order that `model.rope` wants.

    Rotary embedding turns dimensions of a head in pairs. Mistral's files keep partners side by side, 2i and
    2i + 1; in the other order they are half a head apart, i and i + K/2. Pair i is the same pair, turned by
    the same angle.

    Two heads of four dimensions; a letter is a pair, its case the partner:

    >>> interleaved = "a A b B  c C d D".split()
    >>> order = rotate_half_order(torch.arange(8)[:, None], head_dim=4).flatten()
    >>> " ".join(interleaved[i] for i in order)
    'a b A B c d C D'
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
