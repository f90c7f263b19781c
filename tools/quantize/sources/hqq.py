"""What the package hqq saves to safetensors (its versions from 0.2.3 on, also by way of Transformers).

A matrix [N, K] is quantized as one of X = N K / gs groups of `gs` weights: [X, gs] if groups run along the
inputs (axis 1), [gs, X] if along the outputs (axis 0). Its module has these tensors, and some settings, which
all follow from shapes and are not read:

    W_q          uint8, or the dtype of `scale` by which the same bytes are called
    scale, zero  float16, bfloat16 or float32, [X, 1] or [1, X]
    nbits        the number of bits, which shapes tell, too: if they differ, the file is damaged

W_q is the codes' rows, cut into equal parts, of which a byte holds one code each, the first part in the
highest bits. Three bits are ten codes in an int32, with zeros in the two highest bits and rows added to make
their number a multiple of ten.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.names import SPELLINGS
from model.checkpoint.pieces import check_count, check_names, collect, recognize
from model.checkpoint.safetensors import DTYPES, TensorEntry
from model.config import ModelConfig, from_hf, read_json, section
from model.errors import ModelError, quoted
from model.parameters import copies
from tools.quantize.names import GENERATION
from tools.quantize.sources.source import Extent, ModelFiles
from tools.quantize.sources.stored import FLOATS, PartsSource, Plain, extent_of, fills, plain, read_tensor

CODES, SCALE, ZERO, NBITS = "W_q", "scale", "zero", "nbits"
READ = (CODES, SCALE, ZERO, NBITS)
SETTINGS = (  # that are not
    "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
SIGN = f".{CODES}"
BITS = (8, 4, 2, 1)  # that bytes hold; 3 are in int32
TEN = 10  # codes of 3 bits in an int32


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix [N, K]: `rows` of codes [rows, columns], each with a scale if `by_row`, else each
    column with one."""

    N: int
    K: int
    bits: int
    rows: int
    columns: int
    by_row: bool
    name: str
    tensors: Mapping[str, tuple[Path, TensorEntry]]  # by what their names end with

    @property
    def extents(self) -> list[Extent]:
        return [extent_of(path, entry) for path, entry in self.tensors.values()]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.tensors[SCALE][1].dtype]

    def get(self, ending: str) -> Tensor:
        path, entry = self.tensors[ending]
        return read_tensor(path, f"{self.name}.{ending}", entry)

    def read(self) -> Tensor:  # [N, K]
        """The weights, in the dtype of the scales, with each step rounded as hqq does. Raises `ModelError` if
        the file says that they have other bits than shapes do."""
        if self.get(NBITS).tolist() != self.bits:
            raise ModelError(
                f"{self.tensors[NBITS][0]}: {quoted(self.name)} has {self.bits} bits by its shapes and "
                f"{quoted(self.get(NBITS).tolist())} by its nbits; download it again"
            )
        scale, zero = self.get(SCALE).view(-1), self.get(ZERO).view(-1)
        kind, parts, width = (torch.int32, TEN, 30) if self.bits == 3 else (torch.uint8, 8 // self.bits, 8)
        packed = self.get(CODES).view(-1).view(kind).view(-1, self.columns)
        weights = torch.empty(self.rows, self.columns, dtype=self.dtype)
        step = len(packed)
        for part in range(parts):
            rows = weights[part * step : (part + 1) * step]  # the last part may be padded
            codes = packed[: len(rows)] >> width - self.bits * (part + 1) & (1 << self.bits) - 1
            mine = slice(part * step, part * step + len(rows)) if self.by_row else slice(None)
            shape = (-1, 1) if self.by_row else (1, -1)
            rows.copy_(codes).sub_(zero[mine].view(shape)).mul_(scale[mine].view(shape))
        return weights.view(self.N, self.K)


def is_hqq(files: ModelFiles) -> bool:
    """Whether some weights are in this format, by the tensors' names."""
    return any(name.endswith(SIGN) for header in files.headers.values() for name in header.tensors)


def open_hqq(files: ModelFiles) -> PartsSource:
    """Check configuration, names, shapes and dtypes. Raises `ModelError` if anything is not as hqq writes
    it."""
    config = read_config(files.folder)
    found = collect(files.folder, files.headers)
    modules = {name.removesuffix(SIGN) for name in found if name.endswith(SIGN)}
    weights = {name for name in found if name.rpartition(".")[0] not in modules}
    weights |= {f"{module}.weight" for module in modules}
    table = SPELLINGS[recognize(weights)]
    expected = sum(copies(name, config) for names in table.values() for name in names)
    check_count(files.folder, config, expected, len(weights))
    needed = fills(table, config)
    check_names(files.folder, [*dict.fromkeys(name for each in needed.values() for name, _ in each)], weights)
    check_settings(files.folder, modules, found)
    parts: dict[str, list[Matrix | Plain]] = {}
    for parameter, sources in needed.items():
        for name, rows in sources:
            module, part = name.removesuffix(".weight"), None
            if module in modules:
                part = matrix(
                    module, rows.shape, {e: found[f"{module}.{e}"] for e in (CODES, SCALE, ZERO, NBITS)}
                )
            parts.setdefault(parameter, []).append(part or plain(*found[name], name, rows.shape))
    matrices = [part for each in parts.values() for part in each if isinstance(part, Matrix)]
    halves = sum(part.dtype == torch.float16 for part in matrices)
    dtype = torch.float16 if 2 * halves > len(matrices) else torch.bfloat16
    widths = ", ".join(map(str, sorted({part.bits for part in matrices}, reverse=True)))
    return PartsSource(files, config, parts, dtype, f"hqq, {widths} bits", f"HQQ ({widths} bits)")


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration, also where Transformers notes in it that hqq quantized the weights."""
    config, generation = read_json(folder / "config.json"), folder / GENERATION
    if section(config, "quantization_config").get("quant_method") == "hqq":
        del config["quantization_config"]
    return from_hf(config, read_json(generation) if generation.is_file() else {})


def check_settings(folder: Path, modules: Collection[str], found: Mapping[str, object]) -> None:
    """Raises `ModelError` if a module lacks a tensor, or has one that is not known here."""
    due = [f"{module}.{ending}" for module in sorted(modules) for ending in (SCALE, ZERO, NBITS)]
    known = {*due, *(f"{module}.{ending}" for module in modules for ending in (CODES, *SETTINGS))}
    theirs = [name for name in found if name.rpartition(".")[0] in modules]
    check_names(folder, due, [name for name in theirs if name in due or name not in known])


def matrix(module: str, shape: tuple[int, ...], tensors: Mapping[str, tuple[Path, TensorEntry]]) -> Matrix:
    """Derive bits and groups, and check all shapes. Raises `ModelError` if they do not fit together."""
    (path, codes), (_, scale), (_, zero), (_, nbits) = tensors.values()
    N, K = shape if len(shape) == 2 else (1, *shape)
    X = math.prod(scale.shape)
    by_row = scale.shape == (X, 1)
    other = N * K // max(X, 1)
    rows, columns = (X, other) if by_row else (other, X)
    alike = (zero.shape, zero.dtype) == (scale.shape, scale.dtype) and scale.dtype in FLOATS
    bits = None
    grouped = X > 1 and scale.shape in ((X, 1), (1, X)) and X * other == N * K
    if alike and grouped and nbits.shape == () and nbits.dtype in DTYPES:
        bits = bits_of(codes, rows, columns)
    if bits is None:
        what = (f"{e} {entry.dtype} {quoted(list(entry.shape))}" for e, (_, entry) in tensors.items())
        raise ModelError(
            f"{path}: {quoted(module)} has {', '.join(what)}, which make no {list(shape)}; download it again"
        )
    return Matrix(N, K, bits, rows, columns, by_row, module, tensors)


def bits_of(codes: TensorEntry, rows: int, columns: int) -> int | None:
    """The bits of each of the codes [rows, columns]; None if they are not packed as hqq does it.

    Where bytes are called by another dtype, the bytes of a row tell them from int32. Their number alone does
    not: 16 rows take as many at 3 bits as at 4.
    """
    packed, *rest = codes.shape or (0,)
    if len(rest) != 1 or not packed:
        return None
    width = codes.bytes // packed
    if codes.dtype in ("U8", *FLOATS) and width == columns:
        return next((bits for bits in BITS if packed * (8 // bits) == rows), None)
    if codes.dtype in ("I32", *FLOATS) and width == 4 * columns and packed == -(-rows // TEN):
        return 3
    return None
