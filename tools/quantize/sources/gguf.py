"""Models in GGUF, llama.cpp's format.

A type with few bits stores a row as blocks of codes and scales. The package `gguf` has the formulas by which
they become float32 weights. Rows go through them in pieces, so that beside a parameter there is only the
memory of a few pieces, however large the file.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.files import some
from model.checkpoint.load import read_bytes, rotate_half_order
from model.checkpoint.names import GGUF, GGUF_IGNORED, Rows, stored_tensors
from model.checkpoint.pieces import Piece, check_count, check_names, recognize
from model.checkpoint.safetensors import readable
from model.config import ModelConfig
from model.errors import ModelError, quoted
from model.parameters import copies
from tools.quantize.sources.gguf_config import read_config
from tools.quantize.sources.gguf_files import GgufFiles, open_files
from tools.quantize.sources.gguf_header import GgufTensor
from tools.quantize.sources.gguf_tokenizer import tokenizer_files
from tools.quantize.sources.gguf_types import PLAIN, Kind, dequantize, readable_kinds
from tools.quantize.sources.source import Extent, ModelFiles, sampled
from tools.quantize.sources.stored import widest

PIECE = 1 << 20  # weights; with their bytes, and what numpy makes on the way, a thread takes some 8 MB
THREADS = 2
EMBEDDINGS, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"


@dataclass(frozen=True)
class Part:
    """Rows of a tensor in a file, from byte `offset` on, which fill rows of a parameter."""

    path: Path
    tensor: str
    kind: Kind
    offset: int
    rows: Rows

    @property
    def matrix(self) -> tuple[int, int]:
        """The rows' count, and the weights of one. A norm is one row."""
        shape = self.rows.shape
        return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])

    @property
    def bytes(self) -> int:
        N, K = self.matrix
        return N * K // self.kind.weights * self.kind.bytes

    @property
    def dtype(self) -> torch.dtype:
        return PLAIN.get(self.kind.name, torch.float32)

    def fill(self, parameter: Tensor) -> Iterator[partial[None]]:
        """Yield calls, of which each reads a piece into its rows of the parameter. They may run at once."""
        N, K = self.matrix
        start, count = self.rows.start, self.rows.shape[0]
        target = parameter[start : start + count].view(N, K)
        whole = self.rows.head_dim or 1  # rows of a head that stay together
        step = max(PIECE // (K * whole), 1) * whole
        for first in range(0, N, step):
            yield partial(self.read_rows, target[first : first + step], first)

    @torch.inference_mode()
    def read_rows(self, target: Tensor, first: int) -> None:
        """Read rows from number `first` on, as many as `target` has."""
        N, K = target.shape
        row_bytes = K // self.kind.weights * self.kind.bytes
        raw = torch.empty(N, row_bytes, dtype=torch.uint8, device="cpu")
        place = Rows(self.rows.parameter, 0, tuple(raw.shape))
        read_bytes(Piece(self.path, self.tensor, self.offset + first * row_bytes, torch.uint8, place), raw)
        if self.kind.name in PLAIN:
            weights = raw.view(self.dtype)
        else:
            weights = torch.from_numpy(dequantize(raw.numpy(), self.kind))
        if self.rows.head_dim:
            weights = rotate_half_order(weights, self.rows.head_dim)
        target.copy_(weights)


@dataclass(frozen=True)
class GgufSource:
    """See `source.Source`. `parts` has what makes up each parameter, in the order of its rows."""

    files: ModelFiles
    gguf: GgufFiles
    config: ModelConfig
    parts: Mapping[str, list[Part]]

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 if most bytes that are not quantized are, else float16."""
        sizes = self.sizes
        plain = sum(size for kind, size in sizes.items() if kind in PLAIN)
        return torch.bfloat16 if 2 * sizes["BF16"] > plain else torch.float16

    @property
    def gates(self) -> torch.dtype:
        return widest(
            [part.dtype for name, parts in self.parts.items() if ".gate." in name for part in parts]
        )

    @property
    def sizes(self) -> Counter[str]:
        """The bytes of each type's tensors."""
        sizes: Counter[str] = Counter()
        for _, tensor in self.gguf.tensors.values():
            sizes[tensor.kind.name] += tensor.bytes
        return sizes

    @property
    def description(self) -> str:
        count, sizes = len(self.files.paths), self.sizes
        types = self.quantized or sizes.most_common(1)[0][0]
        return f"GGUF, {count} file{'s' * (count > 1)}, {types}, {readable(sizes.total())}"

    @property
    def quantized(self) -> str:
        """The types of quantized tensors, that of most bytes first; empty if there are none."""
        return ", ".join(kind for kind, _ in self.sizes.most_common() if kind not in PLAIN)

    @property
    def lossy(self) -> str | None:
        return f"GGUF ({self.quantized})" if self.quantized else None

    @property
    def tokenizer(self) -> Mapping[str, Path | bytes]:
        return tokenizer_files(self.files.paths[0], self.gguf.keys, self.config.vocab)

    def size(self, parameter: str) -> int:
        return sum(part.bytes for part in self.parts[parameter])

    def extents(self, parameter: str) -> Collection[Extent]:
        return [(part.path, part.offset, part.offset + part.bytes) for part in self.parts[parameter]]

    def read(self, parameter: str, device: torch.device) -> Tensor:
        parts = self.parts[parameter]
        shape = (sum(part.rows.shape[0] for part in parts), *parts[0].rows.shape[1:])
        tensor = torch.empty(shape, dtype=widest([part.dtype for part in parts]), device="cpu")
        with ThreadPoolExecutor(THREADS, thread_name_prefix="gguf") as pool:
            futures = [pool.submit(piece) for part in parts for piece in part.fill(tensor)]
            try:
                for future in futures:
                    future.result()
            finally:  # after an error or Ctrl-C, drop the pieces whose reading has not begun
                for future in futures:
                    future.cancel()
        return tensor.to(device)


def open_gguf(path: Path) -> GgufSource:
    """Open a GGUF file, a part of a model that is split, or a folder with one model in GGUF. Check
    configuration, names, shapes and types. Raises `ModelError` if the model cannot be quantized."""
    found = open_files(path)
    first, tensors = found.paths[0], dict(found.tensors)
    if EMBEDDINGS not in tensors:
        raise ModelError(f"{first}: no tensor {quoted(EMBEDDINGS)}, so this is not a language model")
    config = read_config(first, found.keys, tensors[EMBEDDINGS][1].shape[0])
    tensors.setdefault(HEAD, tensors[EMBEDDINGS])  # tied: llama.cpp does the same
    check_frequencies(tensors, config)
    tensors = {name: each for name, each in tensors.items() if not name.endswith(GGUF_IGNORED)}
    table = GGUF[recognize(tensors, GGUF)]
    check_count(
        first, config, sum(copies(name, config) for names in table.values() for name in names), len(tensors)
    )
    expected = stored_tensors(table, config)
    check_names(first, expected, tensors)
    parts: dict[str, list[Part]] = {}
    for name, stored in expected.items():
        file, tensor = tensors[name]
        check_tensor(file, name, tensor, stored.shape)
        offset = tensor.offset
        for rows in stored.fills:
            part = Part(file, name, tensor.kind, offset, rows)
            parts.setdefault(rows.parameter, []).append(part)
            offset += part.bytes
        assert offset == tensor.offset + tensor.bytes, name
    files = ModelFiles(found.name, first.parent, found.paths, {}, partial(sampled, found.paths))
    return GgufSource(files, found, config, {name: in_order(each) for name, each in parts.items()})


def in_order(parts: list[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part.rows.start)


def check_tensor(path: Path, name: str, tensor: GgufTensor, shape: tuple[int, ...]) -> None:
    """Raises `ModelError` if a tensor has another shape, or a type that cannot be read."""
    if without_ones(tensor.shape) != without_ones(shape):
        raise ModelError(
            f"{path}: tensor {quoted(name)} has shape {list(tensor.shape)}, and must have {list(shape)}"
        )
    if tensor.kind.name not in readable_kinds():
        raise ModelError(
            f"{path}: tensor {quoted(name)} is {tensor.kind.name}, which the package gguf does not read; "
            f"take a file of other types ({some(sorted(readable_kinds()))})"
        )


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without outer dimensions of 1, which GGUF does not keep.

    >>> without_ones((1, 1, 20, 24)), without_ones((8, 1))
    ((20, 24), (8, 1))
    """
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def check_frequencies(tensors: dict[str, tuple[Path, GgufTensor]], config: ModelConfig) -> None:
    """Take out the factors of rotary embedding's frequencies. Raises `ModelError` unless all are 1."""
    if FREQUENCIES not in tensors:
        return
    path, tensor = tensors.pop(FREQUENCIES)
    check_tensor(path, FREQUENCIES, tensor, (config.head_dim // 2,))
    part = Part(path, FREQUENCIES, tensor.kind, tensor.offset, Rows(FREQUENCIES, 0, tensor.shape))
    factors = torch.empty(tensor.shape, dtype=part.dtype)
    for piece in part.fill(factors):
        piece()
    if not (factors == 1).all():
        raise ModelError(
            f"{path}: tensor {quoted(FREQUENCIES)} scales rotary embedding; Mixtral's is not scaled"
        )
