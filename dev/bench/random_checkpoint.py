"""Write a Mixtral checkpoint of a given size with random weights, to measure with.

    python -m dev.bench.random_checkpoint OUT --bytes 2GB
    python -m dev.bench.random_checkpoint OUT --layers 4 --hidden 4096 --ffn 14336 --heads 32 --kv-heads 8
    python -m dev.bench.random_checkpoint OUT --bytes 2GB --experts-format 3g128 --head-format 8

With formats it is a native checkpoint, of the shape that has `--bytes` at 16 bits.
Weights are normal with the usual deviations, so activations stay finite and routers have preferences. They
are cut from one pool of random numbers at changing places, so writing is as fast as the disk, and takes the
memory of one tensor.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.checkpoint.names import HF, StoredTensor, stored_tensors
from model.checkpoint.native import NativeFormat, StoredParameter, native_shards
from model.checkpoint.save import MAX_SHARD_BYTES, write_hf
from model.checkpoint.writer import Writer, write_text
from model.config import ModelConfig, to_hf
from model.parameters import parameter_rows
from model.quant.formats import KINDS, Formats
from model.quant.spec import QuantSpec
from runtime.engine import DEMO
from runtime.loader import EMBEDDINGS
from runtime.shell.arguments import new_parser
from runtime.shell.command import put, run
from runtime.units import parse_bytes
from tools.bench.random_model import fill_normal, fill_stream
from tools.quantize.names import CONFIG
from tools.quantize.output import copy

SMALL = ModelConfig(  # a quarter of Mixtral-8x7B's width, in its proportions
    vocab=32000, hidden=1024, layers=1, heads=8, kv_heads=2, head_dim=128, ffn=3584, experts=8,
    experts_per_token=2, context=4096, rope_theta=1e6, norm_eps=1e-5,
)  # fmt: skip
POOL = (1 << 22) + 1  # elements
DEMO_TOKENIZER = DEMO / "tokenizer.model"


def stored_bytes(config: ModelConfig) -> int:
    """Size of the weights in bfloat16."""
    return sum(2 * math.prod(stored.shape) for stored in stored_tensors(HF, config).values())


def shape_of_size(size: int) -> ModelConfig:
    """As many layers of `SMALL` as come closest to `size` bytes, or narrower layers for small sizes.

    >>> shape_of_size(2_000_000_000).layers, round(stored_bytes(shape_of_size(2_000_000_000)) / 1e9, 2)
    (10, 1.95)
    >>> tiny = shape_of_size(1_000_000); tiny.hidden, tiny.head_dim
    (64, 64)
    """
    shape = dataclasses.replace(SMALL, context=1024)
    while size < 2 * stored_bytes(shape) and shape.hidden > 64:
        hidden = shape.hidden // 2
        shape = dataclasses.replace(
            shape, hidden=hidden, ffn=hidden * 7 // 2, vocab=max(shape.vocab // 2, 2048), head_dim=64,
            heads=max(hidden // 64, 1), kv_heads=max(hidden // 256, 1),
        )  # fmt: skip
    per_layer = stored_bytes(dataclasses.replace(shape, layers=2)) - stored_bytes(shape)
    layers = round((size - stored_bytes(shape)) / per_layer) + 1
    return dataclasses.replace(shape, layers=max(layers, 1))


def random_checkpoint(config: ModelConfig, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a checkpoint to `folder` in bfloat16, with the demo's tokenizer."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator)
    scaled: dict[int, Tensor] = {}  # by fan-in: a few widths occur

    def values(name: str, stored: StoredTensor) -> Tensor:
        if len(stored.shape) == 1:
            return torch.ones(stored.shape)
        fan_in = stored.shape[1]
        if fan_in not in scaled:
            scaled[fan_in] = (pool / math.sqrt(fan_in)).bfloat16()
        start = int(torch.randint(POOL, (1,), generator=generator))
        size = math.prod(stored.shape)
        repeats = (start + size) // POOL + 1
        source = scaled[fan_in]
        return torch.cat([source[start:], *[source] * repeats])[:size].view(stored.shape)

    write_hf(config, folder, values, max_shard_bytes=max_shard_bytes)
    add_tokenizer(folder)


def add_tokenizer(folder: Path) -> None:
    if DEMO_TOKENIZER.is_file():
        copy(DEMO_TOKENIZER, folder / "tokenizer.model")


def random_native(config: ModelConfig, folder: Path, formats: Formats, embedding: float = 1.0) -> None:
    """Write a native checkpoint to `folder`, with the demo's tokenizer. It replaces one with the same number
    of layers. Embeddings are multiplied by `embedding`: the larger, the less layers change them.

    Raises `ModelError` for a format that does not fit the configuration.
    """
    native = NativeFormat(formats, source="random")
    shards = native_shards(config, formats, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    for shard in shards:
        with Writer(folder / shard.name, shard.tensors, native.metadata()) as writer:
            for parameter in shard.parameters:
                write_random(writer, config, parameter, generator, embedding)
    add_tokenizer(folder)
    contents = to_hf(config) | {"quantization_config": native.section()}
    write_text(folder / CONFIG, json.dumps(contents, indent=2) + "\n")


def write_random(
    writer: Writer,
    config: ModelConfig,
    parameter: StoredParameter,
    generator: torch.Generator,
    embedding: float,
) -> None:
    inputs = {name.split(".")[-2]: row[0] for name, (_, row) in parameter_rows(config).items() if row}
    for tensor in parameter.tensors:
        values = torch.ones(tensor.shape, dtype=tensor.dtype)  # norms stay so
        if parameter.spec.quantized:
            stream, matrix = tensor.name.rpartition(".")[2], parameter.name.split(".")[-2]
            fill_stream(stream, values, parameter.spec, inputs[matrix], generator)
        elif len(tensor.shape) == 2:
            fill_normal(values, generator)
            if parameter.name == EMBEDDINGS:
                values.mul_(embedding)
        writer.write(tensor.name, values)


def main(argv: list[str] | None = None) -> int:
    return run(lambda: make(argv))


def make(argv: list[str] | None) -> None:
    """Write the checkpoint that the command line describes."""
    parser = new_parser("dev.bench.random_checkpoint", __doc__)
    parser.add_argument("out", type=Path, help="a folder, made if it is missing")
    parser.add_argument("--bytes", help="about this size, like 2GB; the flags below change the shape")
    names = ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "experts", "context")
    for name in names:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    for kind in KINDS:
        parser.add_argument(f"--{kind}-format", metavar="FORMAT", help="like 3g128 (default: 16)")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    shape = shape_of_size(parse_bytes(args.bytes)) if args.bytes else SMALL
    config = dataclasses.replace(shape, **given)
    formats = {kind: getattr(args, f"{kind}_format") for kind in KINDS}
    specs = {kind: QuantSpec.parse(text) for kind, text in formats.items() if text}
    if specs:
        random_native(config, args.out, Formats(**specs))
    else:
        random_checkpoint(config, args.out)
    put(f"{args.out}: {open_checkpoint(args.out).bytes / 1e9:.3f} GB, {config}\n")


if __name__ == "__main__":
    sys.exit(main())
