"""Checkpoints of format version 1 with random weights, written with NumPy from that version's description."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from model.config import ModelConfig, to_hf

Array = NDArray[Any]
Spec = tuple[int, int, int]  # bits, group size, scales per step
SIXTEEN = (16, 0, 0)


def matrices(config: ModelConfig, n: int) -> Iterator[tuple[str, int, int]]:
    """A layer's matrices that have a format: name, rows, columns."""
    H, G, K, D, F = config.heads, config.kv_heads, config.head_dim, config.hidden, config.ffn
    yield f"layers.{n}.self_attn.qkv_proj", (H + 2 * G) * K, D
    yield f"layers.{n}.self_attn.o_proj", D, H * K
    for e in range(config.experts):
        yield f"layers.{n}.block_sparse_moe.experts.{e}.w13", 2 * F, D
        yield f"layers.{n}.block_sparse_moe.experts.{e}.w2", D, F


def write_version1(
    folder: Path,
    config: ModelConfig,
    attention: Spec,
    experts: Spec,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Array]:
    """Write a checkpoint. Returns all its weights, by the parameter's name, in float32."""
    chance, weights = np.random.default_rng(0), dict[str, Array]()
    V, D, E = config.vocab, config.hidden, config.experts

    def plain(name: str, *shape: int) -> dict[str, torch.Tensor]:
        tensor = torch.from_numpy(chance.standard_normal(shape)).to(dtype)
        weights[name] = tensor.float().numpy()
        return {name: tensor}

    def matrix(name: str, N: int, K: int, spec: Spec) -> dict[str, torch.Tensor]:
        if spec == SIXTEEN:
            return plain(f"{name}.weight", N, K)
        streams, weights[f"{name}.weight"] = random_matrix(chance, N, K, spec)
        return {f"{name}.{stream}": torch.from_numpy(values) for stream, values in streams.items()}

    files = [
        {**plain("embed_tokens.weight", V, D), **plain("norm.weight", D), **plain("lm_head.weight", V, D)}
    ]
    for n in range(config.layers):
        file = {
            **plain(f"layers.{n}.input_layernorm.weight", D),
            **plain(f"layers.{n}.post_attention_layernorm.weight", D),
            **plain(f"layers.{n}.block_sparse_moe.gate.weight", E, D),
        }
        for name, N, K in matrices(config, n):
            file |= matrix(name, N, K, experts if "experts" in name else attention)
        files.append(file)
    metadata = {
        "format": "pt", "quant_method": "mixtral-runtime", "version": "1", "source": "a-mixtral",
        "attention": in_full(attention), "experts": in_full(experts),
    }  # fmt: skip
    folder.mkdir()
    places = {}
    for number, file in enumerate(files, 1):
        path = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(file, folder / path, metadata)
        places |= dict.fromkeys(file, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    names = [name for n in range(config.layers) for name, _, _ in matrices(config, n)]
    errors = {name: chance.random() for name in names if f"{name}.codes" in places}
    (folder / "quantization.json").write_text(json.dumps({"files": sorted(places), "errors": errors}))
    fields = ("bits", "group_size", "meta_group_size")
    said = {
        "quant_method": "mixtral-runtime", "version": 1, "source": "a-mixtral",
        "attention": dict(zip(fields, attention, strict=True)),
        "experts": dict(zip(fields, experts, strict=True)),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(to_hf(config) | {"quantization_config": said}))
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    return weights


def in_full(spec: Spec) -> str:
    return "16" if spec == SIXTEEN else "{}g{}m{}".format(*spec)


def random_matrix(chance: np.random.Generator, N: int, K: int, spec: Spec) -> tuple[dict[str, Array], Array]:
    """The streams of a random matrix [N, K], and its weights."""
    bits, group, meta = spec
    J = K // group
    q = chance.integers(2**bits, size=(N, K), dtype=np.uint8)
    s, z = chance.integers(256, size=(2, N, J), dtype=np.uint8)
    count = math.ceil(N * J / meta)
    t = chance.standard_normal(count).astype(np.float32)
    steps = np.concatenate([t, np.zeros(-count % 4, np.float32)])
    low = {"codes": planar(q, bits, group)} if bits != 3 else {
        "codes": planar(q & 3, 2, group), "codes_high": planar(q >> 2, 1, group)
    }  # fmt: skip
    each = t[np.arange(N * J) // meta].reshape(N, J)  # the step of each group, counted through the matrix
    zeros = z.astype(np.float32) / np.float32(2 ** (8 - bits))
    scales = s.astype(np.float32) * each
    w = (q.reshape(N, J, group).astype(np.float32) - zeros[..., None]) * scales[..., None]
    return {**low, "scales": s, "zeros": z, "steps": steps}, w.reshape(N, K)


def planar(q: Array, width: int, group: int) -> Array:
    """Byte j of a group has code j of each of its parts, the first part in the lowest bits."""
    parts = 8 // width
    size = group // parts
    rows = [
        [
            sum(int(row[start + part * size + j]) << part * width for part in range(parts))
            for start in range(0, len(row), group)
            for j in range(size)
        ]
        for row in q
    ]
    return np.array(rows, np.uint8)
