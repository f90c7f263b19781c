"""Mixtral as a GGUF file of random weights, and single random matrices in llama.cpp's formats.

Blocks are random bytes with scales that give the weights a deviation of 1 / sqrt(inputs), so activations stay
finite.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

SAMPLE = 4096  # blocks whose deviation is measured
SCALES = {  # the places of float16 scales in a block, and each one's share of the first
    Kind.Q4_0: {0: 1.0},
    Kind.Q8_0: {0: 1.0},
    Kind.Q6_K: {208: 1.0},
    Kind.Q4_K: {0: 1.0, 2: 7.5},  # of codes and of minima; these shares give weights a mean of about 0
    Kind.Q2_K: {80: 1.0, 82: 1.5},
}
Tensors = Iterator[tuple[str, tuple[int, ...], Kind]]


def kind_of(quant: str) -> Kind:
    return Kind[quant.upper()]


def write(path: str, shape: dict[str, Any], quant: str, trunk: str, head: str) -> None:
    """Write a model whose `shape` has the fields of `model.config.ModelConfig`, with experts in format
    `quant`, and attention and embeddings in `trunk`."""
    out = gguf.GGUFWriter(path + ".part", "llama")
    add_facts(out, shape)
    tensors = list(model_tensors(shape, kind_of(quant), kind_of(trunk), kind_of(head)))
    for name, dims, kind in tensors:
        dtype = np.float32 if kind is Kind.F32 else np.uint8
        stored = dims if kind is Kind.F32 else gguf.quant_shape_to_byte_shape(dims, kind)
        size = math.prod(stored) * np.dtype(dtype).itemsize
        out.add_tensor_info(name, stored, np.dtype(dtype), size, kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, dims, kind in tensors:
        if kind is not Kind.F32:
            out.write_tensor_data(random_blocks(rng, dims, kind))
        elif len(dims) == 1:
            out.write_tensor_data(np.ones(dims, np.float32))
        else:
            deviation = np.float32(1 / math.sqrt(dims[-1]))
            out.write_tensor_data(rng.standard_normal(dims, np.float32) * deviation)
    out.close()
    os.replace(path + ".part", path)


def add_facts(out: gguf.GGUFWriter, shape: dict[str, Any]) -> None:
    out.add_context_length(shape["context"])
    out.add_embedding_length(shape["hidden"])
    out.add_block_count(shape["layers"])
    out.add_feed_forward_length(shape["ffn"])
    out.add_head_count(shape["heads"])
    out.add_head_count_kv(shape["kv_heads"])
    out.add_key_length(shape["head_dim"])
    out.add_value_length(shape["head_dim"])
    out.add_rope_dimension_count(shape["head_dim"])
    out.add_rope_freq_base(shape["rope_theta"])
    out.add_layer_norm_rms_eps(shape["norm_eps"])
    out.add_expert_count(shape["experts"])
    out.add_expert_used_count(shape["experts_per_token"])
    vocab = shape["vocab"]
    out.add_vocab_size(vocab)
    out.add_tokenizer_model("llama")
    out.add_token_list([b"<unk>", b"<s>", b"</s>", *(b"<%d>" % n for n in range(3, vocab))])
    out.add_token_scores([0.0] * vocab)
    unknown, control, normal = gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    out.add_token_types([unknown, control, control] + [normal] * (vocab - 3))


def model_tensors(shape: dict[str, Any], quant: Kind, trunk: Kind, head: Kind) -> Tensors:
    """Every tensor with its dimensions, the last of which is contiguous, and its format."""
    D, F, E, V = (shape[name] for name in ("hidden", "ffn", "experts", "vocab"))
    Q, KV = (shape[name] * shape["head_dim"] for name in ("heads", "kv_heads"))
    yield "token_embd.weight", (V, D), trunk
    yield "output_norm.weight", (D,), Kind.F32
    yield "output.weight", (V, D), head
    for layer in range(shape["layers"]):
        at = f"blk.{layer}."
        yield f"{at}attn_norm.weight", (D,), Kind.F32
        yield f"{at}attn_q.weight", (Q, D), trunk
        yield f"{at}attn_k.weight", (KV, D), trunk
        yield f"{at}attn_v.weight", (KV, D), trunk
        yield f"{at}attn_output.weight", (D, Q), trunk
        yield f"{at}ffn_norm.weight", (D,), Kind.F32
        yield f"{at}ffn_gate_inp.weight", (E, D), Kind.F32
        yield f"{at}ffn_gate_exps.weight", (E, F, D), quant
        yield f"{at}ffn_up_exps.weight", (E, F, D), quant
        yield f"{at}ffn_down_exps.weight", (E, D, F), quant


def random_matrix(quant: str, outputs: int, inputs: int, seed: int) -> np.ndarray:  # uint8 [outputs, bytes]
    return random_blocks(np.random.default_rng(seed), (outputs, inputs), kind_of(quant))


def random_blocks(rng: np.random.Generator, dims: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Packed weights of these dimensions: uint8, as bytes along the last one."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    count = math.prod(dims) // weights
    blocks = np.frombuffer(bytearray(rng.bytes(count * size)), np.uint8).reshape(count, size)
    sample = blocks[:SAMPLE].copy()
    set_scales(sample, kind, np.ones(len(sample)))
    scale = 1 / math.sqrt(dims[-1]) / float(dequantize(sample, kind).std())
    signs = rng.integers(0, 2, count) * 2 - 1  # since the codes of Q4_0 have a mean of -0.5
    set_scales(blocks, kind, scale * signs)
    return blocks.reshape(*dims[:-1], -1)


def set_scales(blocks: np.ndarray, kind: Kind, scales: np.ndarray) -> None:  # [count, bytes], [count]
    for place, share in SCALES[kind].items():
        blocks[:, place : place + 2] = (scales * share).astype(np.float16)[:, None].view(np.uint8)


def bytes_per_token(path: str) -> int:
    """Bytes of weights that decoding a token reads: one row of the embeddings, the chosen experts, and all of
    the rest."""
    reader = gguf.GGUFReader(path)
    total, used = (
        int(reader.fields[f"llama.{name}"].contents()) for name in ("expert_count", "expert_used_count")
    )
    size = 0
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            size += tensor.n_bytes // int(tensor.shape[-1])
        elif "_exps." in tensor.name:
            size += tensor.n_bytes * used // total
        else:
            size += int(tensor.n_bytes)
    return int(size)
