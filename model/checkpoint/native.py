"""Our own checkpoints of quantized weights: which file holds which streams, and where their formats stand.

The first file has the tensors that belong to no layer, and each layer has a file. An expert is one byte range
of its layer's file, with its tensors in the order of `model.quant.streams.expert_fields`. Formats stand in
`config.json` and in every file's metadata, and the two have to agree.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.names import Rows
from model.checkpoint.pieces import Layout, Piece, check_count, check_names, check_tensor, collect
from model.checkpoint.safetensors import DTYPES, NAMES, Header
from model.checkpoint.writer import TensorSpec
from model.config import NATIVE, Fields, ModelConfig, read_json, section
from model.errors import ModelError, quoted
from model.parameters import GATE, copies, instances, parameter_rows
from model.quant.formats import KINDS, Formats
from model.quant.spec import MAX_GROUP, QuantSpec
from model.quant.streams import matrix_fields

VERSION = 2
AGAIN = "make it again with tools.quantize"
SIXTEEN = ("BF16", "F16")
GATE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class NativeFormat:
    """What a native checkpoint says about itself.

    source  the name of the folder it was made from
    gates   the dtype of the routers' gates, if other tensors that are not quantized have another one
    """

    formats: Formats
    source: str
    gates: torch.dtype | None = None

    def section(self) -> dict[str, Any]:
        """The contents of `quantization_config` in `config.json`."""
        return {
            "quant_method": NATIVE,
            "version": VERSION,
            **{kind: spec_fields(spec) for kind, spec in self.formats.by_kind().items()},
            "source": self.source,
            **self.said_of_gates(),
        }

    def metadata(self) -> dict[str, str]:
        """The metadata of every file, whose values are strings.

        >>> NativeFormat(Formats(experts=QuantSpec(2, 64)), "Mixtral-8x7B").metadata()["experts"]
        '2g64m128'
        """
        return {
            "format": "pt",
            "quant_method": NATIVE,
            "version": str(VERSION),
            **{kind: in_full(spec) for kind, spec in self.formats.by_kind().items()},
            "source": self.source,
            **self.said_of_gates(),
        }

    def said_of_gates(self) -> dict[str, str]:
        return {"gates": str(self.gates).removeprefix("torch.")} if self.gates else {}


def spec_fields(spec: QuantSpec) -> dict[str, int]:
    """A format's numbers, by name.

    >>> spec_fields(QuantSpec(4))
    {'bits': 4, 'group_size': 64, 'meta_group_size': 256}
    """
    return {"bits": spec.bits, "group_size": spec.group_size, "meta_group_size": spec.meta_group_size}


def in_full(spec: QuantSpec) -> str:
    """A format as text, with nothing left to defaults."""
    return f"{spec.bits}g{spec.group_size}m{spec.meta_group_size}" if spec.quantized else f"{spec.bits}"


def read_format(folder: Path) -> NativeFormat | None:
    """What `config.json` says about a native checkpoint; None if this is another checkpoint.

    Raises `ModelError` if this program does not read the version, or if the formats make no sense.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    found = section(read_json(path), "quantization_config")
    return parse_format(found) if found.get("quant_method") == NATIVE else None


def parse_format(found: Mapping[str, Any]) -> NativeFormat:
    """Check the contents of `quantization_config`."""
    where = "config.json quantization_config"
    version = Fields(where, found).int("version")
    if version == 1:  # rows one after the other, and steps that rows shared
        raise ModelError(
            f"{where}: version 1, and this program reads version {VERSION}; convert it with "
            "python -m tools.quantize FOLDER OUT"
        )
    if version != VERSION:
        raise ModelError(
            f"{where}: version {quoted(version)}, and this program reads version {VERSION}; {AGAIN}, "
            "or use the program that wrote it"
        )
    source = found.get("source")
    if not isinstance(source, str):
        raise ModelError(f"{where}: source is {quoted(source)}, and must be a text")
    gates = found.get("gates")
    if gates is not None and (not isinstance(gates, str) or gates not in GATE_DTYPES):
        raise ModelError(f"{where}: gates is {quoted(gates)}, and must be one of {', '.join(GATE_DTYPES)}")
    specs = {kind: parse_spec(where, found, kind) for kind in KINDS}
    return NativeFormat(Formats(**specs), source, GATE_DTYPES[gates] if gates else None)


def parse_spec(where: str, found: Mapping[str, Any], name: str) -> QuantSpec:
    """Check one format, whose three numbers have to be written out."""
    fields = Fields(f"{where} {name}", section(found, name))
    numbers = [fields.int(key) for key in ("bits", "group_size", "meta_group_size")]
    if not all(0 <= number <= MAX_GROUP for number in numbers):
        raise ModelError(f"{fields.source}: a size is below 0 or above {MAX_GROUP}; {AGAIN}")
    try:
        spec = QuantSpec(*numbers)
    except ModelError as error:
        raise ModelError(f"{fields.source}: {error}") from error
    if list(spec_fields(spec).values()) != numbers:
        raise ModelError(f"{fields.source}: sizes are not written out; {AGAIN}")
    return spec


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of the network, and the tensors that it is stored as."""

    name: str
    spec: QuantSpec
    tensors: tuple[TensorSpec, ...]
    weights: int  # their number

    @property
    def matrix(self) -> str:
        """The part of the name that all its tensors share."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Shard:
    """One file, and its parameters in order."""

    name: str
    parameters: tuple[StoredParameter, ...]

    @property
    def tensors(self) -> list[TensorSpec]:
        return [tensor for parameter in self.parameters for tensor in parameter.tensors]


def native_shards(
    config: ModelConfig, formats: Formats, dtype: torch.dtype, gates: torch.dtype | None = None
) -> list[Shard]:
    """Every file of a native checkpoint, in order. Parameters that are not quantized are stored in `dtype`,
    and gates in their own if there is one.

    Raises `ModelError`, which names the tensor, if a format does not fit it.
    """
    by_file: list[list[StoredParameter]] = [[] for _ in range(config.layers + 1)]
    for layer, parameter in stored_parameters(config, formats, dtype, gates):
        by_file[layer + 1].append(parameter)
    count = len(by_file)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(parameters))
        for number, parameters in enumerate(by_file, start=1)
    ]


def stored_parameters(
    config: ModelConfig, formats: Formats, dtype: torch.dtype, gates: torch.dtype | None = None
) -> Iterator[tuple[int, StoredParameter]]:
    """Every parameter with its layer, which is -1 for those that belong to none."""
    shapes = parameter_rows(config)
    for template, n, e in instances(config):
        spec = formats.spec_of(template)
        rows, row = shapes[template]
        name = template.format(n=n, e=e)
        kept = gates or dtype if name.endswith(GATE) else dtype
        fields = matrix_fields(name.removesuffix(".weight"), (sum(rows), *row), spec, dtype=kept)
        tensors = tuple(TensorSpec(field.name, field.dtype, field.shape) for field in fields)
        yield n if "{n}" in template else -1, StoredParameter(name, spec, tensors, sum(rows) * math.prod(row))


def stream_count(config: ModelConfig, formats: Formats) -> int:
    """Count the tensors of `stored_parameters` without going through them."""
    count = 0
    for template, (rows, row) in parameter_rows(config).items():
        name, spec = template.removesuffix(".weight"), formats.spec_of(template)
        count += copies(template, config) * len(matrix_fields(name, (sum(rows), *row), spec))
    return count


def native_layout(
    folder: Path, headers: Mapping[Path, Header], config: ModelConfig, native: NativeFormat
) -> Layout:
    """The layout of a native checkpoint, in which every tensor is a parameter or stream of the same name.

    Raises `ModelError` as `pieces.match` does, and if a file belongs to another checkpoint.
    """
    check_metadata(headers, native.metadata())
    parameters = stored_parameters(config, native.formats, torch.bfloat16, native.gates)
    stored = (parameter for _, parameter in parameters)
    return stream_layout("native", folder, headers, config, native.formats, stored)


def check_metadata(headers: Mapping[Path, Header], expected: Mapping[str, str]) -> None:
    """Raises `ModelError` if the metadata of a file is not as expected."""
    for path, header in headers.items():
        for key, value in expected.items():
            said = header.metadata.get(key)
            if said != value:
                raise ModelError(
                    f"{path}: its metadata says {key} {quoted(said)}, and config.json says "
                    f"{quoted(value)}; the files belong to different checkpoints, {AGAIN}"
                )


def stream_layout(
    spelling: str,
    folder: Path,
    headers: Mapping[Path, Header],
    config: ModelConfig,
    formats: Formats,
    stored: Iterable[StoredParameter],
) -> Layout:
    """The layout of files that hold exactly the tensors of `stored`, of which those in 16 bits may be in
    either dtype. Raises as `pieces.match` does."""
    found = collect(folder, headers)
    check_count(folder, config, stream_count(config, formats), len(found))
    expected = {tensor.name: (tensor, parameter.spec) for parameter in stored for tensor in parameter.tensors}
    check_names(folder, expected, found)
    pieces = []
    for name, (tensor, spec) in expected.items():
        path, entry = found[name]
        own = (NAMES[tensor.dtype],)
        check_tensor(path, name, entry, tensor.shape, SIXTEEN if own[0] in SIXTEEN else own, AGAIN)
        rows = Rows(name, 0, tensor.shape)
        pieces.append(Piece(path, name, entry.offset, DTYPES[entry.dtype], rows, exact=spec.quantized))
    return Layout.of(spelling, pieces, headers)
