"""GGUF files of small Mixtrals, as llama.cpp's converters write them, by the package `gguf`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor

from model.config import ModelConfig
from tokenizer.vocabulary import Kind

Kinds = Callable[[str], Type]  # the type of a tensor, by its name
Token = tuple[str, float, Kind]


def gguf_tensors(config: ModelConfig, hf: Mapping[str, Tensor], experts: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint in HF's spelling, float32, with their names in GGUF.

    `experts` is "split", "merged" or "fused".
    """
    made = {
        "token_embd.weight": hf["model.embed_tokens.weight"],
        "output_norm.weight": hf["model.norm.weight"],
        "output.weight": hf["lm_head.weight"],
    }
    for n in range(config.layers):
        layer, at = f"model.layers.{n}.", f"blk.{n}."
        made[f"{at}attn_norm.weight"] = hf[f"{layer}input_layernorm.weight"]
        made[f"{at}ffn_norm.weight"] = hf[f"{layer}post_attention_layernorm.weight"]
        for ours, theirs, heads in (
            ("q", "attn_q", config.heads),
            ("k", "attn_k", config.kv_heads),
            ("v", "attn_v", 0),
            ("o", "attn_output", 0),
        ):
            weight = hf[f"{layer}self_attn.{ours}_proj.weight"]
            made[f"{at}{theirs}.weight"] = interleaved(weight, heads) if heads else weight
        moe = f"{layer}block_sparse_moe."
        made[f"{at}ffn_gate_inp.weight"] = hf[f"{moe}gate.weight"]
        gate, down, up = (
            [hf[f"{moe}experts.{e}.w{i}.weight"] for e in range(config.experts)] for i in (1, 2, 3)
        )
        for name, each in (("gate", gate), ("up", up), ("down", down)):
            if experts == "split":
                made |= {f"{at}ffn_{name}.{e}.weight": weight for e, weight in enumerate(each)}
            elif experts == "merged" or name == "down":
                made[f"{at}ffn_{name}_exps.weight"] = torch.stack(each)
        if experts == "fused":
            both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            made[f"{at}ffn_gate_up_exps.weight"] = torch.stack(both)
    return {name: tensor.float().contiguous().numpy() for name, tensor in made.items()}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k with the two halves of each head interleaved."""
    K = len(weight) // heads
    order = [head * K + half * K // 2 + i for head in range(heads) for i in range(K // 2) for half in (0, 1)]
    return weight[order]


def facts_of(config: ModelConfig) -> dict[str, Any]:
    """The keys that say what the model is."""
    return {
        "llama.block_count": config.layers,
        "llama.context_length": config.context,
        "llama.embedding_length": config.hidden,
        "llama.feed_forward_length": config.ffn,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.scaling.type": "linear" if config.rope_factor != 1 else None,
        "llama.rope.scaling.factor": config.rope_factor if config.rope_factor != 1 else None,
        "llama.expert_count": config.experts,
        "llama.expert_used_count": config.experts_per_token,
    }


def tokens_of(tokens: Sequence[Token], **others: Any) -> dict[str, Any]:
    """The keys of a tokenizer. `others` have the names that follow `tokenizer.ggml.`."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in tokens],
        "tokenizer.ggml.scores": [float(score) for _, score, _ in tokens],
        "tokenizer.ggml.token_type": [int(kind) for _, _, kind in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        **{f"tokenizer.ggml.{name}": value for name, value in others.items()},
    }


def of_one_type(kind: Type) -> Kinds:
    """Matrices of this type. Routers and norms stay float32, as converters leave them."""
    return lambda name: kind if "norm" not in name and "gate_inp" not in name else Type.F32


def packed(array: np.ndarray, kind: Type) -> np.ndarray:
    return array if kind is Type.F32 else quantize(array, kind)


def write_gguf(
    path: Path, tensors: Mapping[str, np.ndarray], kinds: Kinds, facts: Mapping[str, Any], **writer: Any
) -> None:
    """Write a file, or several if `writer` asks for it. A key whose value is None is left out. Arrays of
    bytes are taken as packed in their type already."""
    out = gguf.GGUFWriter(path, facts.get("general.architecture", "llama"), **writer)
    for name, value in facts.items():
        if value is not None and name != "general.architecture":
            add(out, name, value)
    for name, array in tensors.items():
        kind = kinds(name)
        data = array if array.dtype == np.uint8 else packed(array, kind)
        out.add_tensor(name, data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def add(out: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        out.add_bool(name, value)
    elif isinstance(value, int):
        out.add_uint32(name, value)
    elif isinstance(value, float):
        out.add_float32(name, value)
    elif isinstance(value, str):
        out.add_string(name, value)
    else:
        out.add_array(name, value)


def as_read(tensors: Mapping[str, np.ndarray], kinds: Kinds) -> dict[str, np.ndarray]:
    """The weights of each tensor after packing, by the package's own function on whole tensors."""
    return {
        name: dequantize(array if array.dtype == np.uint8 else packed(array, kinds(name)), kinds(name))
        for name, array in tensors.items()
    }


def parameters(config: ModelConfig, read: Mapping[str, np.ndarray], experts: str) -> dict[str, Tensor]:
    """Our parameters, made from a file's tensors row by row."""
    made = {"embed_tokens.weight": read["token_embd.weight"], "norm.weight": read["output_norm.weight"]}
    made["lm_head.weight"] = read.get("output.weight", read["token_embd.weight"])
    for n in range(config.layers):
        at, to = f"blk.{n}.", f"layers.{n}."
        made[f"{to}input_layernorm.weight"] = read[f"{at}attn_norm.weight"]
        made[f"{to}post_attention_layernorm.weight"] = read[f"{at}ffn_norm.weight"]
        made[f"{to}block_sparse_moe.gate.weight"] = read[f"{at}ffn_gate_inp.weight"]
        made[f"{to}self_attn.o_proj.weight"] = read[f"{at}attn_output.weight"]
        rows = [*halves(read[f"{at}attn_q.weight"], config), *halves(read[f"{at}attn_k.weight"], config)]
        made[f"{to}self_attn.qkv_proj.weight"] = np.stack([*rows, *read[f"{at}attn_v.weight"]])
        for e in range(config.experts):
            if experts == "split":
                gate, up, down = (read[f"{at}ffn_{name}.{e}.weight"] for name in ("gate", "up", "down"))
            else:
                down = read[f"{at}ffn_down_exps.weight"][e]
                if experts == "fused":
                    gate, up = np.split(read[f"{at}ffn_gate_up_exps.weight"][e], 2)
                else:
                    gate, up = (read[f"{at}ffn_{name}_exps.weight"][e] for name in ("gate", "up"))
            made[f"{to}block_sparse_moe.experts.{e}.w13.weight"] = np.concatenate([gate, up])
            made[f"{to}block_sparse_moe.experts.{e}.w2.weight"] = down
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in made.items()}


def halves(rows: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    """Rows of q or k, those of even places in a head before the others."""
    heads = [rows[at : at + config.head_dim] for at in range(0, len(rows), config.head_dim)]
    return [row for head in heads for row in (*head[0::2], *head[1::2])]
