"""From files into a model: one pass over the bytes, each read once, to where it stays.

Weights that are on the CPU in the dtype of the file are read into their own memory. All others go through a
few buffers of `CHUNK_BYTES`, and are converted from there. Plain reads, no memory maps: what the process is
charged for is the model and these buffers. Two readers take turns, so that one converts, or takes page
faults, while the other reads.
"""

import queue
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import foreign
from model.checkpoint.files import check_folder, weight_files
from model.checkpoint.native import native_layout, read_format
from model.checkpoint.pieces import Layout, Piece, match
from model.checkpoint.safetensors import byte_view, read_header, readable
from model.config import ModelConfig
from model.errors import ModelError, quoted
from model.mixtral import Mixtral
from model.quant.spec import QuantSpec

CHUNK_BYTES = 16 << 20
READERS = 2
UNQUANTIZED = QuantSpec(16)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and checked, and whose weights have not been touched yet.

    `attention` and `experts` are the formats that these matrices are stored in.
    """

    folder: Path
    config: ModelConfig
    layout: Layout
    files: int
    attention: QuantSpec = UNQUANTIZED
    experts: QuantSpec = UNQUANTIZED

    @property
    def native(self) -> bool:
        """Whether what it fills are streams of `model.quant.streams`, and not parameters of `Mixtral`."""
        return self.layout.spelling == "native"

    @property
    def bytes(self) -> int:
        """What there is to read: the sum of what `progress` will be told."""
        return sum(piece.bytes for piece in self.layout.pieces)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most bytes are stored in, of those that are not quantized."""
        sizes: Counter[torch.dtype] = Counter()
        for piece in self.layout.pieces:
            if not piece.exact:
                sizes[piece.dtype] += piece.bytes
        return sizes.most_common(1)[0][0]

    @property
    def description(self) -> str:
        """For people: `HF, 19 files, bfloat16, 93 GB`, `native, 9 files, attention 4, experts 3, 5 MB`."""
        files = f"{self.files} file{'s' * (self.files > 1)}"
        dtype = str(self.dtype).removeprefix("torch.")
        if self.native:
            dtype = f"attention {self.attention}, experts {self.experts}"
        return f"{self.layout.spelling}, {files}, {dtype}, {readable(self.bytes)}"

    def load(self, model: Mixtral, progress: Callable[[int], None] | None = None) -> None:
        """Fill every parameter of `model`, which has this configuration, in its own dtype and on its device.

        `progress` is called from this thread with the bytes read since the last call. Raises `ModelError` if
        a file cannot be read or is no longer what its header said; the model's weights are then undefined.
        """
        parameters = dict(model.named_parameters())
        for name in self.layout.shapes.keys() - parameters.keys():
            raise ModelError(f"{self.folder}: parameter {name!r} is only in the checkpoint")
        self.fill(parameters, progress)

    def fill(
        self,
        tensors: Mapping[str, Tensor],
        progress: Callable[[int], None] | None = None,
        pool: Executor | None = None,
    ) -> None:
        """Read into some tensors, or all, wherever they are kept: by the names and shapes of Mixtral's
        parameters, or in a native checkpoint of the streams in `model.quant.streams`.

        Parameters are converted to the dtype of their tensor. Streams are not, and must have their own.
        `progress` is as for `load`. What is more than one piece of `CHUNK_BYTES` is read by the threads of
        `pool`, which this must not be called from, or where there is none by two that are started for it.

        An expert into its blob, for any checkpoint, with `name` like `layers.0.block_sparse_moe.experts.3.`:

            checkpoint.fill({field.name: field.view(blob) for field in expert_fields(config, spec, name)})

        Raises `ModelError` for a name, shape or dtype that the checkpoint does not have, before anything is
        read; and as `load`.
        """
        check_tensors(self.folder, tensors, self.layout)
        pieces = self.layout.filling(tensors)
        chunks = [chunk for piece in pieces for chunk in piece.split(CHUNK_BYTES)]
        indirect = [c.bytes for c in chunks if not reads_in_place(c, tensors[c.rows.parameter])]
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(min(READERS, len(indirect))):
            buffers.put(torch.empty(max(indirect), dtype=torch.uint8, device="cpu", pin_memory=pinned))

        def read(chunk: Piece) -> int:
            tensor = tensors[chunk.rows.parameter]
            if reads_in_place(chunk, tensor):
                read_piece(chunk, tensor, None)
                return chunk.bytes
            buffer = buffers.get()
            try:
                read_piece(chunk, tensor, buffer)
            finally:
                buffers.put(buffer)
            return chunk.bytes

        if sum(chunk.bytes for chunk in chunks) <= CHUNK_BYTES:
            report(map(read, chunks), progress)
        elif pool:
            read_in(pool, read, chunks, progress)
        else:
            with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint") as own:
                read_in(own, read, chunks, progress)


def read_in(
    pool: Executor,
    read: Callable[[Piece], int],
    chunks: Iterable[Piece],
    progress: Callable[[int], None] | None,
) -> None:
    """Read chunks in the threads of a pool. When this returns or raises, none of them is still at it."""
    futures = [pool.submit(read, chunk) for chunk in chunks]
    try:
        report((future.result() for future in futures), progress)
    finally:  # an error, or Ctrl-C: what has not begun is dropped
        for future in futures:
            future.cancel()
        wait(futures)


def report(sizes: Iterable[int], progress: Callable[[int], None] | None) -> None:
    for size in sizes:
        if progress:
            progress(size)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find and check a checkpoint: configuration, files, headers, names, shapes and dtypes. No weights yet.

    Raises `ModelError`, one line that names what is wrong.
    """
    try:
        check_folder(folder)
        foreign.check_files(folder)
        config, native = ModelConfig.read(folder), read_format(folder)
        files = weight_files(folder)
        headers = {path: read_header(path) for path in files}
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror})") from error
    if native is None:
        foreign.check_tensors(folder, (name for header in headers.values() for name in header.tensors))
        return Checkpoint(folder, config, match(folder, headers, config), len(files))
    layout = native_layout(folder, headers, config, native)
    return Checkpoint(folder, config, layout, len(files), native.attention, native.experts)


def check_tensors(folder: Path, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Raises `ModelError` unless the checkpoint has all of these, in these shapes; streams in their dtype."""
    for name, tensor in tensors.items():
        shape = layout.shapes.get(name)
        if shape is None:
            raise ModelError(f"{folder}: parameter {name!r} is only in the model")
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{folder}: parameter {name!r} is {list(shape)}, and {list(tensor.shape)} in the model"
            )
        piece = layout.pieces[layout.places[name][0]]
        if piece.exact and tensor.dtype != piece.dtype:
            raise ModelError(f"{folder}: {name!r} is {piece.dtype} and not converted to {tensor.dtype}")


def reads_in_place(piece: Piece, tensor: Tensor) -> bool:
    """Whether the file's bytes are the tensor's."""
    as_stored = tensor.device.type == "cpu" and tensor.dtype == piece.dtype and tensor.is_contiguous()
    return as_stored and not piece.rows.head_dim


@torch.inference_mode()
def read_piece(piece: Piece, parameter: Tensor, buffer: Tensor | None) -> None:
    """Read one piece into its rows of the parameter, by way of `buffer` (bytes) if there is one."""
    rows = parameter[piece.rows.start : piece.rows.start + piece.rows.shape[0]]
    if buffer is None:
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
            f"{piece.path}: tensor {quoted(piece.tensor)} cannot be read ({error.strerror})"
        ) from error
    if memory:
        raise ModelError(
            f"{piece.path}: ended {len(memory)} bytes early, in tensor {quoted(piece.tensor)}; did it change?"
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
