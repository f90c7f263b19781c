"""The checkpoint of mixtral-offloading (arXiv 2312.17238), which an early version of hqq quantized.

The trunk is one file, in which tensors have HF's names. Every expert is a file, in which names are the
expert's own: `w1.W_q`. Only the index tells which expert a file is. A matrix [N, K] with groups of `gs`
weights is seven tensors, with X = N K / gs groups of which `sg` share a scale:

    W_q                    uint8    [gs * bits / 8, X]
    meta.scale_q           uint8    [sg, X / sg]
    meta.meta_scale.scale  float16  [1, X / sg], and so is .zero
    meta.zero_q            uint8    [1, X]
    meta.meta_zero.scale   float16  [], and so is .zero

Nothing records `bits`, `gs` and `sg`: they follow from the shapes. Groups run along the outputs: with
G = N / gs, row n belongs to group n % G of its column. W_q is the codes of all weights, row by row, cut into
8 / bits equal parts, of which a byte holds one code each, the first part in the highest bits.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.files import MAX_INDEX_BYTES
from model.checkpoint.names import HF, Rows
from model.checkpoint.pieces import check_count, check_names, collect
from model.checkpoint.safetensors import DTYPES, TensorEntry
from model.config import ModelConfig, read_json
from model.errors import ModelError, quoted
from model.parameters import ATTENTION, EXPERT, copies
from tools.quantize.sources.source import Extent, ModelFiles
from tools.quantize.sources.stored import PartsSource, Plain, extent_of, fills, plain, read_tensor, widest

INDEX = "model.safetensors.index.json"
SCALES = ("meta.meta_scale.scale", "meta.meta_scale.zero")
ZEROS = ("meta.meta_zero.scale", "meta.meta_zero.zero")
ENDINGS = ("W_q", "meta.scale_q", *SCALES, "meta.zero_q", *ZEROS)
BITS = (2, 4, 8)
EXAMPLES = {"attention": ATTENTION[0], "experts": EXPERT + "w13.weight"}
SIGN = ".meta.scale_q"  # what names of this format end with, and no other's


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix [N, K]: `tensors` has its seven tensors by what their names end with."""

    name: str
    N: int
    K: int
    bits: int
    groups: int  # of a column
    tensors: Mapping[str, tuple[Path, TensorEntry]]

    @property
    def extents(self) -> list[Extent]:
        return [extent_of(path, entry) for path, entry in self.tensors.values()]

    @property
    def dtype(self) -> torch.dtype:
        """float16, unless scales of scales are float32."""
        return widest([DTYPES[self.tensors[ending][1].dtype] for ending in SCALES])

    def get(self, ending: str) -> Tensor:
        path, entry = self.tensors[ending]
        return read_tensor(path, f"{self.name}.{ending}", entry)

    def read(self) -> Tensor:  # [N, K]
        """The weights, by the formula of that version of hqq, with each step rounded as it did."""
        parts, G, K = 8 // self.bits, self.groups, self.K
        scale, zero = self.get("meta.scale_q").half(), self.get("meta.zero_q").half()
        scale = ((scale - self.get(SCALES[1])) * self.get(SCALES[0])).view(1, G, K)
        zero = ((zero - self.get(ZEROS[1])) * self.get(ZEROS[0])).view(1, G, K)
        packed = self.get("W_q").view(-1, G, K)
        weights = torch.empty(parts, *packed.shape, dtype=self.dtype)
        for part in range(parts):
            codes = (packed >> 8 - self.bits * (part + 1)) & (1 << self.bits) - 1
            torch.mul(codes.half() - zero, scale, out=weights[part])
        return weights.view(self.N, K)


def is_offloading(files: ModelFiles) -> bool:
    """Whether the weights are in this format, by the tensors' names."""
    return any(name.endswith(SIGN) for header in files.headers.values() for name in header.tensors)


def open_offloading(files: ModelFiles) -> PartsSource:
    """Check configuration, index, names, shapes and dtypes. Raises `ModelError` if anything is not as this
    format has it."""
    config = ModelConfig.read(files.folder)
    found = sum(len(header.tensors) for header in files.headers.values())
    check_count(
        files.folder, config, sum(copies(name, config) for names in HF.values() for name in names), found
    )
    experts = expert_files(files, config)
    theirs = {*experts.values()}
    trunk = collect(
        files.folder, {path: header for path, header in files.headers.items() if path not in theirs}
    )
    needed = fills(HF, config)
    check_names(files.folder, [*trunk_names(needed)], trunk)
    for path in experts.values():
        check_names(
            path, [f"w{i}.{ending}" for i in (1, 2, 3) for ending in ENDINGS], files.headers[path].tensors
        )
    parts: dict[str, list[Matrix | Plain]] = {}
    part: Matrix | Plain
    for parameter, sources in needed.items():
        for name, rows in sources:
            module = name.removesuffix(".weight")
            if ".experts." in name:
                expert, _, local = module.rpartition(".")
                path = experts[expert]
                tensors = files.headers[path].tensors
                part = matrix(local, rows.shape, {e: (path, tensors[f"{local}.{e}"]) for e in ENDINGS})
            elif is_matrix(name):
                part = matrix(module, rows.shape, {e: trunk[f"{module}.{e}"] for e in ENDINGS})
            else:
                part = plain(*trunk[name], name, rows.shape)
            parts.setdefault(parameter, []).append(part)
    first = {kind: parts[name.format(n=0, e=0)][0] for kind, name in EXAMPLES.items()}
    widths = ", ".join(f"{kind} {part.bits}" for kind, part in first.items() if isinstance(part, Matrix))
    program = "mixtral-offloading"
    return PartsSource(
        files, config, parts, torch.float16, f"{program}, {widths}", f"{program}'s HQQ ({widths})"
    )


def expert_files(files: ModelFiles, config: ModelConfig) -> dict[str, Path]:
    """The file of every expert, by the expert's name, as the index says. Raises `ModelError` if it names
    none, one that is not there, or one for two experts."""
    path = files.folder / INDEX
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    by_name = {file.name: file for file in files.paths}
    found: dict[str, Path] = {}
    for layer in range(config.layers):
        for e in range(config.experts):
            expert = f"model.layers.{layer}.block_sparse_moe.experts.{e}"
            name = weight_map.get(f"{expert}.w1.W_q") if isinstance(weight_map, dict) else None
            if not isinstance(name, str) or name not in by_name:
                raise ModelError(
                    f"{path}: {expert} is in {quoted(name)}, which is not there; download it again"
                )
            found[expert] = by_name[name]
    if len(set(found.values())) < len(found):
        raise ModelError(f"{path}: two of {len(found)} experts are in the same file; download it again")
    return found


def is_matrix(name: str) -> bool:
    return ".self_attn." in name


def trunk_names(needed: Mapping[str, list[tuple[str, Rows]]]) -> Collection[str]:
    """The names of all tensors but those of experts."""
    names: list[str] = []
    for sources in needed.values():
        for name, _ in sources:
            if is_matrix(name):
                names += [f"{name.removesuffix('.weight')}.{ending}" for ending in ENDINGS]
            elif ".experts." not in name:
                names.append(name)
    return names


def matrix(name: str, shape: tuple[int, ...], tensors: Mapping[str, tuple[Path, TensorEntry]]) -> Matrix:
    """Derive bits and groups, and check all shapes. Raises `ModelError` if they do not fit together."""
    N, K = shape
    shapes = {ending: entry.shape for ending, (_, entry) in tensors.items()}
    codes, X = math.prod(shapes["W_q"]), math.prod(shapes["meta.zero_q"])
    bits, rest = divmod(8 * codes, N * K)
    if rest or bits not in BITS or not X or X % K or N % (X // K) or (N * K // X) % (8 // bits):
        raise ModelError(
            f"{tensors['W_q'][0]}: {quoted(name)} has {codes} bytes of codes and {X} zeros, which make no "
            f"matrix {[N, K]} of {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits; download it again"
        )
    sg = (*shapes["meta.scale_q"], 1)[0]
    per_group = [1, X // sg] if sg and not X % sg else [1, X]
    due: dict[str, tuple[tuple[str, ...], list[int]]] = {
        "W_q": (("U8",), list(shapes["W_q"])),
        "meta.scale_q": (("U8",), [X // per_group[1], per_group[1]]),
        "meta.zero_q": (("U8",), [1, X]),
        **dict.fromkeys(SCALES, (("F16", "F32"), per_group)),
        **dict.fromkeys(ZEROS, (("F16", "F32"), [])),
    }
    for ending, (dtypes, sizes) in due.items():
        path, entry = tensors[ending]
        if entry.dtype not in dtypes or list(entry.shape) != sizes:
            raise ModelError(
                f"{path}: tensor {quoted(f'{name}.{ending}')} is {entry.dtype} {quoted(list(entry.shape))}, "
                f"and must be {' or '.join(dtypes)} {sizes}; download it again"
            )
    return Matrix(name, N, K, bits, X // K, tensors)
