"""Reads the weights of a checkpoint into a model: one pass over the files, which reads each byte once.
If embeddings and head are tied, their bytes are read for each of them.

A weight that is on the CPU in the dtype of the file is read into its own memory. Other weights go through two
buffers of `CHUNK_BYTES`, and are converted from there. So the process is charged for the model and these
buffers alone. There are two readers, so that one can read while the other converts or takes page faults.

Weights that a CPU keeps as files have them need no reading: see `Checkpoint.mappable` and `mapped.py`.
"""

import queue
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import foreign
from model.checkpoint.files import check_folder, weight_files
from model.checkpoint.mapped import in_runs
from model.checkpoint.native import NativeFormat, native_layout, read_format
from model.checkpoint.pieces import Layout, Piece, match
from model.checkpoint.safetensors import Header, byte_view, read_header, readable
from model.config import ModelConfig, ties_embeddings
from model.errors import ModelError, quoted
from model.mixtral import Mixtral
from model.parameters import EMBEDDINGS, GATE, NORM
from model.part import Part
from model.quant.formats import PLAIN, Formats
from model.quant.streams import model_fields

CHUNK_BYTES = 16 << 20
READERS = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and checked, and whose weights have not been read.

    It may be a part of one (see `part`). `formats` are those that its matrices are stored in.
    """

    folder: Path
    config: ModelConfig
    layout: Layout
    files: int
    formats: Formats = PLAIN

    def part(self, part: Part) -> "Checkpoint":
        """Some layers of this checkpoint as one of a model of fewer layers. It reads no byte of others."""
        layout = self.layout.part(part)
        files = len({piece.path for piece in layout.pieces})
        return replace(self, config=part.config(self.config), layout=layout, files=files)

    @property
    def embeds(self) -> bool:
        """Whether it has the embeddings. A part may lack them."""
        return EMBEDDINGS in self.layout.shapes

    @property
    def heads(self) -> bool:
        """Whether it has the last norm and the head. A part may lack them."""
        return NORM in self.layout.shapes

    @property
    def native(self) -> bool:
        """Whether it holds streams of `model.quant.streams` rather than parameters of `Mixtral`."""
        return self.layout.spelling == "native"

    @property
    def bytes(self) -> int:
        """Bytes to read: the sum of what `progress` will be called with."""
        return sum(piece.bytes for piece in self.layout.pieces)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most bytes that are not quantized. Gates, which may have one of their own, do not
        count."""
        sizes: Counter[torch.dtype] = Counter()
        for piece in self.layout.pieces:
            if not piece.exact and not piece.rows.parameter.endswith(GATE):
                sizes[piece.dtype] += piece.bytes
        return sizes.most_common(1)[0][0]

    @cached_property
    def mappable(self) -> torch.dtype | None:
        """If matrices and experts lie in the files as memory would have them, the dtype of what is not
        quantized; None for other checkpoints. Then `MappedFiles(layout)` can take the place of reading."""
        if not self.native:
            return None
        dtype = self.dtype
        fields = model_fields(self.config, self.formats, dtype)
        of_memory = (  # gates are always read, and a part lacks some of the other fields
            field for field in fields if field.name in self.layout.shapes and not field.name.endswith(GATE)
        )
        return dtype if in_runs(self.layout, of_memory) else None

    @property
    def description(self) -> str:
        """Like `HF, 19 files, bfloat16, 93 GB` or `native, 9 files, attention 4, experts 3, head 8, 5 MB`."""
        files = f"{self.files} file{'s' * (self.files > 1)}"
        stored = str(self.formats) if self.native else str(self.dtype).removeprefix("torch.")
        return f"{self.layout.spelling}, {files}, {stored}, {readable(self.bytes)}"

    def load(self, model: Mixtral, progress: Callable[[int], None] | None = None) -> None:
        """Fill every parameter of `model`, which has this configuration, in its own dtype and on its device.

        `progress` is called from this thread with the bytes read since the last call. Raises `ModelError` if
        a file cannot be read, or if it has changed since its header was read. The model's weights are then
        undefined.
        """
        parameters = dict(model.named_parameters())
        for name in self.layout.shapes.keys() - parameters.keys():
            raise ModelError(f"{self.folder}: parameter {name!r} is only in the checkpoint")
        self.fill(parameters, progress)

    def read(self, name: str, device: torch.device) -> Tensor:
        """One parameter, or one stream of a native checkpoint, in the dtype of the file. Raises as `fill`
        does."""
        dtype = self.layout.filling([name])[0].dtype
        tensor = torch.empty(self.layout.shapes[name], dtype=dtype, device=device)
        self.fill({name: tensor})
        return tensor

    def fill(
        self,
        tensors: Mapping[str, Tensor],
        progress: Callable[[int], None] | None = None,
        pool: Executor | None = None,
    ) -> None:
        """Read into `tensors`, on any device, by the names and shapes of Mixtral's parameters or, in a native
        checkpoint, of the streams in `model.quant.streams`.

        Parameters are converted to the dtype of their tensor. Streams are not, so a tensor must have a
        stream's dtype. `progress` is as for `load`. The threads of `pool` read more than `CHUNK_BYTES`, or
        without a pool two threads that this starts. Do not call this from a thread of `pool`.

        To read an expert into its blob, with `name` like `layers.0.block_sparse_moe.experts.3.`:

            checkpoint.fill({field.name: field.view(blob) for field in expert_fields(config, spec, name)})

        Raises `ModelError`, before anything is read, if the checkpoint does not have a name, its shape or its
        dtype. Also raises as `load` does.
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
            buffer = None if reads_in_place(chunk, tensor) else buffers.get()
            try:
                read_piece(chunk, tensor, buffer)
            finally:
                if buffer is not None:
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
    """Read chunks in the threads of a pool. When this returns or raises, no thread is still reading."""
    futures = [pool.submit(read, chunk) for chunk in chunks]
    try:
        report((future.result() for future in futures), progress)
    finally:  # after an error or Ctrl-C, drop the chunks whose reading has not begun
        for future in futures:
            future.cancel()
        wait(futures)


def report(sizes: Iterable[int], progress: Callable[[int], None] | None) -> None:
    for size in sizes:
        if progress:
            progress(size)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find a checkpoint, and check its configuration, files, headers, names, shapes and dtypes.

    Reads no weights. Raises `ModelError` if the checkpoint cannot be used.
    """
    try:
        check_folder(folder)
        foreign.check_files(folder)
        config, native = ModelConfig.read(folder), read_format(folder)
        headers = {path: read_header(path) for path in weight_files(folder)}
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror})") from error
    return described(folder, config, native, headers)


def checkpoint_of(folder: Path, headers: Mapping[Path, Header]) -> Checkpoint:
    """The checkpoint whose configuration is in `folder`, and whose weight files have these headers. The files
    need not be there yet. Raises `ModelError` as `open_checkpoint` does."""
    return described(folder, ModelConfig.read(folder), read_format(folder), headers)


def described(
    folder: Path, config: ModelConfig, native: NativeFormat | None, headers: Mapping[Path, Header]
) -> Checkpoint:
    """Compare headers with what the configuration says of them."""
    if native is None:
        foreign.check_tensors(folder, (name for header in headers.values() for name in header.tensors))
        layout = match(folder, headers, config, ties_embeddings(folder))
        return Checkpoint(folder, config, layout, len(headers))
    layout = native_layout(folder, headers, config, native)
    return Checkpoint(folder, config, layout, len(headers), native.formats)


def check_tensors(folder: Path, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Raises `ModelError` unless the checkpoint has all of `tensors` in these shapes, and streams in these
    dtypes."""
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
    """Whether the piece can be read right into the tensor's memory."""
    as_stored = tensor.device.type == "cpu" and tensor.dtype == piece.dtype and tensor.is_contiguous()
    return as_stored and not piece.rows.head_dim


@torch.inference_mode()
def read_piece(piece: Piece, parameter: Tensor, buffer: Tensor | None) -> None:
    """Read one piece into its rows of the parameter, through `buffer` [uint8] if there is one."""
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
    """Read a piece's bytes into the memory of a contiguous CPU tensor of that size."""
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
    """Bring rows of q or k from Mistral's interleaved order to the rotate-half order that `model.rope` wants.

    Rotary embedding turns the dimensions of a head in pairs. Mistral's files keep the two of a pair side by
    side, at 2i and 2i + 1. In rotate-half order they are half a head apart, at i and i + K/2. Pair i turns by
    the same angle in both.

    For two heads of four dimensions, with a letter for each pair:

    >>> interleaved = "a A b B  c C d D".split()
    >>> order = rotate_half_order(torch.arange(8)[:, None], head_dim=4).flatten()
    >>> " ".join(interleaved[i] for i in order)
    'a b A B c d C D'
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
