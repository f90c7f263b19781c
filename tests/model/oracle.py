"""Transformers' Mixtral with the same weights as ours. The mapping of names is independent of the code under
test."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import MixtralForCausalLM

from dev.peers.config import their_config
from model.config import ModelConfig
from model.mixtral import Mixtral


def random_oracle(config: ModelConfig, seed: int, tied: bool = False) -> MixtralForCausalLM:
    """Transformers' model, initialized by Transformers, but with norms that are not all ones."""
    torch.manual_seed(seed)
    theirs = their_config(config)
    theirs.tie_word_embeddings = tied
    oracle = MixtralForCausalLM(theirs).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
            else:
                parameter.mul_(5)  # with their 0.02, the logits of a tiny model are almost equal
    return oracle


def to_oracle(model: Mixtral) -> MixtralForCausalLM:
    oracle = MixtralForCausalLM(their_config(model.config)).eval()
    oracle.load_state_dict(to_their_names(model.config, model.state_dict()))
    return oracle


def from_oracle(config: ModelConfig, oracle: MixtralForCausalLM) -> Mixtral:
    model = Mixtral(config)
    model.load_state_dict(to_our_names(config, oracle.state_dict()))
    return model


def to_their_names(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    q, kv, F = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.ffn
    theirs = {
        "model.embed_tokens.weight": ours["embed_tokens.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    for i in range(config.layers):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            theirs[there + norm] = ours[here + norm]
        qkv = ours[here + "self_attn.qkv_proj.weight"]
        theirs[there + "self_attn.q_proj.weight"] = qkv[:q]
        theirs[there + "self_attn.k_proj.weight"] = qkv[q : q + kv]
        theirs[there + "self_attn.v_proj.weight"] = qkv[q + kv : q + kv + kv]
        theirs[there + "self_attn.o_proj.weight"] = ours[here + "self_attn.o_proj.weight"]
        theirs[there + "mlp.gate.weight"] = ours[here + "block_sparse_moe.gate.weight"]
        w13 = [ours[f"{here}block_sparse_moe.experts.{e}.w13.weight"] for e in range(config.experts)]
        w2 = [ours[f"{here}block_sparse_moe.experts.{e}.w2.weight"] for e in range(config.experts)]
        w1, w3 = [w[:F] for w in w13], [w[F:] for w in w13]
        gate_up = [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        theirs[there + "mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        theirs[there + "mlp.experts.down_proj"] = torch.stack(w2)
    return theirs


def to_our_names(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {name.removeprefix("model."): tensor for name, tensor in theirs.items() if ".layers." not in name}
    for i in range(config.layers):
        layer = {n.removeprefix(f"model.layers.{i}."): t for n, t in theirs.items() if f".layers.{i}." in n}
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"):
            ours[f"layers.{i}.{name}"] = layer[name]
        ours[f"layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(
            [
                layer["self_attn.q_proj.weight"],
                layer["self_attn.k_proj.weight"],
                layer["self_attn.v_proj.weight"],
            ]
        )
        moe = f"layers.{i}.block_sparse_moe."
        ours[moe + "gate.weight"] = layer["mlp.gate.weight"]
        for e in range(config.experts):
            ours[f"{moe}experts.{e}.w13.weight"] = layer["mlp.experts.gate_up_proj"][e]
            ours[f"{moe}experts.{e}.w2.weight"] = layer["mlp.experts.down_proj"][e]
    return ours
