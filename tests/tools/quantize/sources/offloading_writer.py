"""What mixtral-offloading did to a model, written from its paper's settings and hqq's formulas of that time.

Groups of a matrix run along its outputs. Their scales and zeros are quantized again: scales in groups that
run over the list of scales in strides, zeros all together.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TRUNK = "model-trunk.safetensors"


def levels(x: Tensor, bits: int, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize between the least and the greatest of each column, or of all: codes, scale and zero."""
    low = x.amin() if axis is None else x.amin(axis, keepdim=True)
    high = x.amax() if axis is None else x.amax(axis, keepdim=True)
    inverse = ((1 << bits) - 1) / (high - low).clamp(min=1e-6)
    zero = -low * inverse
    codes = (x * inverse + zero).round().clamp(0, (1 << bits) - 1)
    return codes.to(torch.uint8), 1 / inverse, zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """hqq's packing of [rows, columns]: a byte has one code of each equal part of the rows."""
    step = len(codes) * bits // 8
    packed = torch.zeros(step, codes.shape[1], dtype=torch.uint8)
    for part in range(8 // bits):
        packed |= codes[part * step : (part + 1) * step] << 8 - bits * (part + 1)
    return packed


def quantized(weight: Tensor, bits: int, group: int, together: int) -> dict[str, Tensor]:
    """The seven tensors of a matrix [N, K]."""
    codes, scale, zero = levels(weight.float().reshape(group, -1), bits, 0)  # [group, X], [1, X]
    scale_q, meta_scale, meta_zero = levels(scale.reshape(together, -1), 8, 0)
    zero_q, zero_scale, zero_zero = levels(zero, 8, None)
    return {
        "W_q": pack(codes, bits),
        "meta.scale_q": scale_q,
        "meta.meta_scale.scale": meta_scale.half(),
        "meta.meta_scale.zero": meta_zero.half(),
        "meta.zero_q": zero_q,
        "meta.meta_zero.scale": zero_scale.half(),
        "meta.meta_zero.zero": zero_zero.half(),
    }


def write_offloading(
    hf: Path, folder: Path, attention: tuple[int, int, int], experts: tuple[int, int, int]
) -> None:
    """Make such a checkpoint of an HF one. A format is bits, group size and scales per scale."""
    folder.mkdir()
    tensors = {name: t for path in hf.glob("*.safetensors") for name, t in load_file(path).items()}
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, Tensor]] = {TRUNK: {}}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        expert, _, local = module.rpartition(".")
        if ".experts." in name:
            file, prefix, made = f"{expert}.safetensors", local, quantized(tensor, *experts)
        elif ".self_attn." in name:
            file, prefix, made = TRUNK, module, quantized(tensor, *attention)
        else:
            files[TRUNK][name] = tensor.half()
            weight_map[name] = TRUNK
            continue
        for ending, value in made.items():
            files.setdefault(file, {})[f"{prefix}.{ending}"] = value.contiguous()
            weight_map[f"{module}.{ending}"] = file
    for file, contents in files.items():
        save_file(contents, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_bytes((hf / "config.json").read_bytes())


def dequantized(tensors: dict[str, Tensor], N: int, K: int) -> Tensor:
    """The weights [N, K] of seven tensors, one at a time, by the formula in float16."""
    packed, scale_q, zero_q = (
        tensors[key].flatten().tolist() for key in ("W_q", "meta.scale_q", "meta.zero_q")
    )
    meta_scale, meta_zero = (tensors[f"meta.meta_scale.{key}"].flatten() for key in ("scale", "zero"))
    zero_scale, zero_zero = tensors["meta.meta_zero.scale"], tensors["meta.meta_zero.zero"]
    bits, G = 8 * len(packed) // (N * K), len(zero_q) // K
    step, half = N * K * bits // 8, torch.float16
    made = torch.empty(N, K, dtype=half)
    for n in range(N):
        for k in range(K):
            g, flat = (n % G) * K + k, n * K + k
            column = g % len(meta_scale)
            scale = (torch.tensor(scale_q[g], dtype=half) - meta_zero[column]) * meta_scale[column]
            zero = (torch.tensor(zero_q[g], dtype=half) - zero_zero) * zero_scale
            code = packed[flat % step] >> 8 - bits * (flat // step + 1) & (1 << bits) - 1
            made[n, k] = (torch.tensor(code, dtype=half) - zero) * scale
    return made
