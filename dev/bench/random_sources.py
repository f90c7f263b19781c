"""Random models as other programs write them, with Mixtral-8x7B's matrices, to measure `tools.quantize` with.

Codes are random, and scales give the weights a deviation of about 1 / sqrt(inputs). Nothing is quantized
here, so writing is as fast as the disk.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dev.bench.random_checkpoint import add_tokenizer, random_checkpoint
from model.checkpoint.names import HF, stored_tensors
from model.checkpoint.writer import TensorSpec, Writer, write_text
from model.config import ModelConfig, to_hf

Made = tuple[TensorSpec, Callable[[], Tensor]]  # a tensor, and what makes it when it is written
SHARD = 2_000_000_000  # bytes of a file of a model at the hub
HQQ_BITS, HQQ_GROUP = 4, 64
ATTENTION, EXPERT = (4, 64, 256), (2, 16, 128)  # mixtral-offloading's bits, group size, scales per meta group


def write_hf(config: ModelConfig, folder: Path) -> Path:
    random_checkpoint(config, folder)
    return folder


def write_gguf(config: ModelConfig, folder: Path) -> Path:
    """Merged experts in Q4_0, attention and embeddings in Q4_0, and the head in Q6_K."""
    from dev.peers.llamacpp import gguf_model

    folder.mkdir(parents=True)
    gguf_model.write(str(folder / "model.gguf"), asdict(config), "q4_0", "q4_0", "q6_k")
    return folder / "model.gguf"


def write_hqq(config: ModelConfig, folder: Path) -> Path:
    """What hqq 0.2.8 writes to safetensors: 4 bits, groups of 64 along the inputs, float16."""
    made: dict[str, list[Made]] = {}
    for name, shape in hf_shapes(config):
        if is_linear(name):
            made[name] = list(hqq_tensors(name.removesuffix(".weight"), shape))
        else:
            made[name] = [plain(name, shape)]
    write(folder / "model.safetensors", [each for tensors in made.values() for each in tensors])
    return finish(config, folder)


def hqq_tensors(module: str, shape: tuple[int, ...]) -> Iterator[Made]:
    N, K = shape
    groups = N * K // HQQ_GROUP
    scale = 1 / math.sqrt(K) / 4.6  # the deviation of uniform codes from 0 to 15
    yield codes(f"{module}.W_q", (groups // 2, HQQ_GROUP))
    yield constant(f"{module}.scale", (groups, 1), scale)
    yield constant(f"{module}.zero", (groups, 1), 7.5)
    facts: dict[str, bool | int | str] = {
        "nbits": HQQ_BITS,
        "group_size": HQQ_GROUP,
        "axis": 1,
        "offload_meta": False,
    }
    facts |= {"view_as_float": False, "encoded_state_dict": True}
    facts |= {
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": False,
        "packing": "4bit_u8",
    }
    facts |= {"unpack_view_dtype": "torch.uint8", "compute_dtype": "torch.float16", "quant_zero": False}
    facts |= {"quant_scale": False}
    yield fact(f"{module}.shape", torch.tensor([N, K]))
    for name, value in facts.items():
        yield fact(f"{module}.{name}", encoded(value))


def encoded(value: bool | int | str) -> Tensor:
    """A setting as hqq stores it."""
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    return torch.tensor(int(value), dtype=torch.uint8 if isinstance(value, bool) else torch.int32)


def write_offloading(config: ModelConfig, folder: Path) -> Path:
    """mixtral-offloading's own layout: a file for each expert, and one for all else."""
    trunk: list[Made] = []
    weight_map: dict[str, str] = {}
    experts: dict[str, list[Made]] = {}
    for name, shape in hf_shapes(config):
        module = name.removesuffix(".weight")
        if ".experts." in name:
            expert, _, matrix = module.rpartition(".")
            experts.setdefault(expert, []).extend(offloading_tensors(matrix, shape, *EXPERT))
        elif is_linear(name):
            trunk += offloading_tensors(module, shape, *ATTENTION)
        else:
            trunk.append(plain(name, shape))
    for number, (expert, tensors) in enumerate(experts.items()):
        file = f"expert-{number}.safetensors"
        write(folder / file, tensors)
        weight_map |= {f"{expert}.{spec.name}": file for spec, _ in tensors}
    write(folder / "trunk.safetensors", trunk)
    weight_map |= {spec.name: "trunk.safetensors" for spec, _ in trunk}
    write_text(
        folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return finish(config, folder)


def offloading_tensors(
    module: str, shape: tuple[int, ...], bits: int, group: int, together: int
) -> Iterator[Made]:
    N, K = shape
    groups = N * K // group
    levels = (1 << bits) - 1
    scale = 1 / math.sqrt(K) / (levels / math.sqrt(12))
    yield codes(f"{module}.W_q", (group * bits // 8, groups))
    yield codes(f"{module}.meta.scale_q", (together, groups // together))
    yield constant(f"{module}.meta.meta_scale.scale", (1, groups // together), scale / 128)
    yield constant(f"{module}.meta.meta_scale.zero", (1, groups // together), 0)
    yield codes(f"{module}.meta.zero_q", (1, groups))
    yield constant(f"{module}.meta.meta_zero.scale", (), levels / 255)
    yield constant(f"{module}.meta.meta_zero.zero", (), 0)


def hf_shapes(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, stored.shape) for name, stored in stored_tensors(HF, config).items()]


def is_linear(name: str) -> bool:
    return ".self_attn." in name or ".experts." in name


def plain(name: str, shape: tuple[int, ...]) -> Made:
    """A tensor that is not quantized: a norm of ones, or normal weights."""
    if len(shape) == 1:
        return constant(name, shape, 1.0)
    deviation = 1 / math.sqrt(shape[1])
    return TensorSpec(name, torch.float16, shape), lambda: (torch.randn(shape) * deviation).half()


def codes(name: str, shape: tuple[int, ...]) -> Made:
    spec = TensorSpec(name, torch.uint8, shape)
    return spec, lambda: torch.randint(0, 256, shape, dtype=torch.uint8)


def constant(name: str, shape: tuple[int, ...], value: float) -> Made:
    spec = TensorSpec(name, torch.float16, shape)
    return spec, lambda: torch.full(shape, value, dtype=torch.float16)


def fact(name: str, value: Tensor) -> Made:
    return TensorSpec(name, value.dtype, tuple(value.shape)), lambda: value


def write(path: Path, tensors: list[Made]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with Writer(path, [spec for spec, _ in tensors]) as writer:
        for spec, make in tensors:
            writer.write(spec.name, make())


def finish(config: ModelConfig, folder: Path) -> Path:
    write_text(folder / "config.json", json.dumps(to_hf(config, "float16")))
    add_tokenizer(folder)
    return folder


def write_shards(config: ModelConfig, folder: Path) -> Path:
    random_checkpoint(config, folder, max_shard_bytes=SHARD)
    return folder


WRITERS = {
    "HF": write_hf,
    "hub": write_shards,
    "GGUF": write_gguf,
    "hqq": write_hqq,
    "mixtral-offloading": write_offloading,
}
