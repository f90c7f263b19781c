"""Writes a model as an HF checkpoint: `config.json` and `model.safetensors`, or shards and their index."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.names import HF, StoredTensor, stored_tensors
from model.checkpoint.writer import TensorSpec, Writer, write_text
from model.config import ModelConfig, to_hf
from model.mixtral import Mixtral

MAX_SHARD_BYTES = 5_000_000_000


def save_hf(
    model: Mixtral, folder: Path, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model` to `folder` in `dtype`, with a tensor for each projection of each expert."""
    parameters = dict(model.named_parameters())

    def gather(name: str, stored: StoredTensor) -> Tensor:
        (rows,) = stored.fills
        return parameters[rows.parameter][rows.start : rows.start + rows.shape[0]]

    write_hf(model.config, folder, gather, dtype, max_shard_bytes)


def write_hf(
    config: ModelConfig,
    folder: Path,
    values: Callable[[str, StoredTensor], Tensor],
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write an HF checkpoint whose tensors are `values(name, stored)`, called for one at a time.

    This replaces a checkpoint in `folder`, file by file if it has the same number of shards. Do not read it
    meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(HF, config)
    shards = split_shards(
        [TensorSpec(name, dtype, stored.shape) for name, stored in tensors.items()], max_shard_bytes
    )
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weight_map = {}
    for number, specs in enumerate(shards, start=1):
        path = single if len(shards) == 1 else folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with Writer(path, specs, {"format": "pt"}) as writer:
            for spec in specs:
                writer.write(spec.name, values(spec.name, tensors[spec.name]).detach().to(dtype))
                weight_map[spec.name] = path.name
    if len(shards) == 1:
        index.unlink(missing_ok=True)
    else:
        total = sum(spec.bytes for specs in shards for spec in specs)
        contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(index, json.dumps(contents, indent=2) + "\n")
        single.unlink(missing_ok=True)
    write_text(
        folder / "config.json", json.dumps(to_hf(config, str(dtype).removeprefix("torch.")), indent=2) + "\n"
    )


def split_shards(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Divide tensors, in order, among shards of up to `limit` bytes. A larger tensor has a shard of its own.

    >>> specs = [TensorSpec(name, torch.float32, (size,)) for name, size in zip("abcd", (2, 1, 9, 1))]
    >>> [[spec.name for spec in shard] for shard in split_shards(specs, 12)]
    [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.bytes > room:
            shards.append([])
            room = limit
        shards[-1].append(spec)
        room -= spec.bytes
    return shards
