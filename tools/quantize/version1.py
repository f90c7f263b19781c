"""Checkpoints of version 1, and how their bytes become those of version 2. No weight changes by a bit.

In version 1 the streams of a matrix [N, K] with J = K / group_size groups to a row are

    name.codes       uint8    [N, K * bits / 8]         3 bits: the low plane, [N, K / 4]
    name.codes_high  uint8    [N, K / 8]                3 bits only: the high plane
    name.scales      uint8    [N, J]
    name.zeros       uint8    [N, J]
    name.steps       float32  [N * J / meta_group_size, rounded up, then to a multiple of 4]

A group of codes is cut into as many equal parts as a byte has room for codes, and byte j has code j of every
part, the first part in the lowest bits. A step serves `meta_group_size` groups, counted row by row through
the whole matrix. Attention and experts have formats, and the head has none.

Codes, scales and zeros need another order only. A row's own steps repeat those that it shared.
"""

import math
import warnings
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.checkpoint.files import check_folder, weight_files
from model.checkpoint.native import (
    NativeFormat,
    StoredParameter,
    check_metadata,
    parse_spec,
    stream_layout,
)
from model.checkpoint.safetensors import read_header
from model.checkpoint.writer import TensorSpec
from model.config import NATIVE, ModelConfig, read_json, section
from model.errors import ModelError, quoted
from model.parameters import instances, parameter_rows
from model.quant.formats import Formats
from model.quant.packing import PLANES, mask, pack_plane
from model.quant.spec import QuantSpec
from model.quant.streams import CODES
from model.quant.tensor import QuantizedTensor, by_block
from tools.quantize.journal import MAX_BYTES, Errors, is_errors
from tools.quantize.names import RECORD
from tools.quantize.weights import converted

VERSION = 1
STEPS = 4  # a multiple of these was stored


def is_version1(folder: Path) -> bool:
    """Whether `config.json` says so. Raises `ModelError` if it cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    found = section(read_json(path), "quantization_config")
    return found.get("quant_method") == NATIVE and found.get("version") == VERSION


def open_version1(folder: Path) -> tuple[Checkpoint, NativeFormat]:
    """A checkpoint of version 1, with its headers checked, and its formats in version 2.

    Raises `ModelError` if the checkpoint is damaged, or has a matrix that version 2 cannot store.
    """
    check_folder(folder)
    config, (formats, source) = ModelConfig.read(folder), read_formats(folder)
    converted = Formats(*(kept(kind, spec, config) for kind, spec in formats.by_kind().items()))
    files = weight_files(folder)
    headers = {path: read_header(path) for path in files}
    check_metadata(headers, metadata(formats, source))
    stored = stored_parameters(config, formats)
    layout = stream_layout("native of version 1", folder, headers, config, formats, stored)
    checkpoint = Checkpoint(folder, config, layout, len(files), formats)
    for piece in layout.pieces:
        if not piece.exact and piece.dtype != checkpoint.dtype:
            raise ModelError(
                f"{piece.path}: tensor {quoted(piece.tensor)} is {piece.dtype}, and others are "
                f"{checkpoint.dtype}; the files belong to different checkpoints"
            )
    return checkpoint, NativeFormat(converted, source)


def read_formats(folder: Path) -> tuple[Formats, str]:
    """The formats that `config.json` states, and the name of the 16-bit source."""
    where = "config.json quantization_config"
    found = section(read_json(folder / "config.json"), "quantization_config")
    source = found.get("source")
    if not isinstance(source, str):
        raise ModelError(f"{where}: source is {quoted(source)}, and must be a text")
    return Formats(parse_spec(where, found, "attention"), parse_spec(where, found, "experts")), source


def metadata(formats: Formats, source: str) -> dict[str, str]:
    """What every file's metadata states."""
    found = NativeFormat(formats, source).metadata() | {"version": str(VERSION)}
    del found["head"]
    return found


def kept(kind: str, spec: QuantSpec, config: ModelConfig) -> QuantSpec:
    """The format of version 2 into which this one converts: so few scales per step that no row's step
    replaces two.

    Groups were counted through the matrix, so a row's first one is any multiple of J. Raises `ModelError` if
    version 2 cannot store the matrices.
    """
    if not spec.quantized:
        return spec
    together = spec.meta_group_size
    for template, (rows, row) in parameter_rows(config).items():
        if Formats(**{kind: spec}).spec_of(template).quantized:
            name, shape = template.removesuffix(".weight"), (sum(rows), *row)
            try:
                spec.check(name, shape)
            except ModelError as error:
                reason = str(error).partition(";")[0]
                raise ModelError(f"{reason}; quantize the 16-bit checkpoint again") from error
            together = math.gcd(together, shape[1] // spec.group_size)
    return QuantSpec(spec.bits, spec.group_size, together)


def stored_parameters(config: ModelConfig, formats: Formats) -> Iterator[StoredParameter]:
    """Every parameter with the tensors that it is stored as in version 1."""
    shapes = parameter_rows(config)
    for template, n, e in instances(config):
        spec, (rows, row) = formats.spec_of(template), shapes[template]
        name, shape = template.format(n=n, e=e), (sum(rows), *row)
        yield StoredParameter(name, spec, tuple(tensors(name, shape, spec)), math.prod(shape))


def recorded_errors(folder: Path, matrices: Container[str]) -> Errors:
    """The errors of these matrices that `quantization.json` has. Warns if the file is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        found = read_json(path, MAX_BYTES).get("errors")
    except ModelError:
        found = None
    if not is_errors(found):
        warnings.warn(f"{path}: damaged; the output records no errors", RuntimeWarning, stacklevel=2)
        return {}
    return {name: error for name, error in found.items() if name in matrices}


def tensors(name: str, shape: tuple[int, ...], spec: QuantSpec) -> Iterator[TensorSpec]:
    if not spec.quantized:
        yield TensorSpec(name, torch.bfloat16, shape)
        return
    (N, K), matrix = shape, name.removesuffix(".weight")
    J = K // spec.group_size
    for stream, width in zip(CODES, PLANES[spec.bits], strict=False):
        yield TensorSpec(f"{matrix}.{stream}", torch.uint8, (N, K * width // 8))
    yield TensorSpec(f"{matrix}.scales", torch.uint8, (N, J))
    yield TensorSpec(f"{matrix}.zeros", torch.uint8, (N, J))
    steps = -(-N * J // spec.meta_group_size)
    yield TensorSpec(f"{matrix}.steps", torch.float32, (-(-steps // STEPS) * STEPS,))


def from_version1(
    source: Checkpoint, specs: Mapping[str, QuantSpec], parameter: StoredParameter, pool: Executor
) -> tuple[list[Tensor], None]:
    """One parameter's tensors in version 2. `specs` are the formats in version 1, by the parameter's name.

    Raises `ModelError` if a weight or a step is not a finite number.
    """
    cpu = torch.device("cpu")
    if not parameter.spec.quantized:
        weight = source.read(parameter.name, cpu)
        return [converted(parameter.name, weight, source.dtype)], None
    names = [tensor.name for tensor in parameter.tensors]
    streams = {name.rpartition(".")[2]: source.read(name, cpu) for name in names}
    if not torch.isfinite(streams["steps"]).all():
        raise ModelError(f"{parameter.matrix}: has steps that are not finite numbers; the source is damaged")
    made = convert(streams, specs[parameter.name], parameter.spec)
    return list(made.streams().values()), None


def convert(streams: Mapping[str, Tensor], old: QuantSpec, new: QuantSpec) -> QuantizedTensor:
    """A matrix of version 1, given as its streams by name, in the format that `kept` returned for its own."""
    N, J = streams["scales"].shape
    made = {
        stream: pack_plane(unpack_plane(streams[stream], width, old.group_size), width)
        for stream, width in zip(CODES, PLANES[old.bits], strict=False)
    }
    made |= {stream: by_block(streams[stream]) for stream in ("scales", "zeros")}
    first = torch.arange(N)[:, None] * J + torch.arange(0, J, new.meta_group_size)  # group of each new step
    made["steps"] = by_block(streams["steps"][first // old.meta_group_size])
    return QuantizedTensor.of(new, (N, J * old.group_size), made)


def unpack_plane(packed: Tensor, width: int, group_size: int) -> Tensor:  # [N, K * width / 8] -> [N, K]
    """The codes of a plane, one to a byte.

    >>> packed = torch.tensor([[0xE4, 0x24, 0x64, 0xFF]], dtype=torch.uint8)
    >>> unpack_plane(packed, width=2, group_size=16)[0].tolist()
    [0, 0, 0, 3, 1, 1, 1, 3, 2, 2, 2, 3, 3, 0, 1, 3]
    """
    N, parts = packed.shape[0], 8 // width
    groups = packed.view(N, -1, group_size // parts)
    codes = packed.new_empty(N, groups.shape[1], parts, group_size // parts)
    for part in range(parts):
        torch.bitwise_and(groups >> part * width, mask(width), out=codes[:, :, part])
    return codes.view(N, -1)
