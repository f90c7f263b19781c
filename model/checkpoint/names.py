"""Tables of what each exporter calls Mixtral's tensors, and their names and shapes for a configuration.

A table's left side is a parameter of `model.mixtral.Mixtral`, with `{n}` for its layer and `{e}` for its
expert. The right side lists the tensors whose rows make it up, in order. If the left side has an `{e}` and
the right side has none, one tensor [E, rows, columns] holds all experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ModelConfig
from model.parameters import EXPERT, instances, parameter_rows

Table = Mapping[str, tuple[str, ...]]

HF_TRUNK: Table = {
    "embed_tokens.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
    "layers.{n}.input_layernorm.weight": ("model.layers.{n}.input_layernorm.weight",),
    "layers.{n}.self_attn.qkv_proj.weight": (
        "model.layers.{n}.self_attn.q_proj.weight",
        "model.layers.{n}.self_attn.k_proj.weight",
        "model.layers.{n}.self_attn.v_proj.weight",
    ),
    "layers.{n}.self_attn.o_proj.weight": ("model.layers.{n}.self_attn.o_proj.weight",),
    "layers.{n}.post_attention_layernorm.weight": ("model.layers.{n}.post_attention_layernorm.weight",),
}
HF: Table = {  # Transformers' files since 2023
    **HF_TRUNK,
    "layers.{n}.block_sparse_moe.gate.weight": ("model.layers.{n}.block_sparse_moe.gate.weight",),
    "layers.{n}.block_sparse_moe.experts.{e}.w13.weight": (
        "model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight",
        "model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight",
    ),
    "layers.{n}.block_sparse_moe.experts.{e}.w2.weight": (
        "model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight",
    ),
}
HF_STACKED: Table = {  # Transformers 5, saved as it has them in memory
    **HF_TRUNK,
    "layers.{n}.block_sparse_moe.gate.weight": ("model.layers.{n}.mlp.gate.weight",),
    "layers.{n}.block_sparse_moe.experts.{e}.w13.weight": ("model.layers.{n}.mlp.experts.gate_up_proj",),
    "layers.{n}.block_sparse_moe.experts.{e}.w2.weight": ("model.layers.{n}.mlp.experts.down_proj",),
}
MISTRAL: Table = {  # consolidated.safetensors, as mistral-inference reads it
    "embed_tokens.weight": ("tok_embeddings.weight",),
    "norm.weight": ("norm.weight",),
    "lm_head.weight": ("output.weight",),
    "layers.{n}.input_layernorm.weight": ("layers.{n}.attention_norm.weight",),
    "layers.{n}.self_attn.qkv_proj.weight": (
        "layers.{n}.attention.wq.weight",
        "layers.{n}.attention.wk.weight",
        "layers.{n}.attention.wv.weight",
    ),
    "layers.{n}.self_attn.o_proj.weight": ("layers.{n}.attention.wo.weight",),
    "layers.{n}.post_attention_layernorm.weight": ("layers.{n}.ffn_norm.weight",),
    "layers.{n}.block_sparse_moe.gate.weight": ("layers.{n}.feed_forward.gate.weight",),
    "layers.{n}.block_sparse_moe.experts.{e}.w13.weight": (
        "layers.{n}.feed_forward.experts.{e}.w1.weight",
        "layers.{n}.feed_forward.experts.{e}.w3.weight",
    ),
    "layers.{n}.block_sparse_moe.experts.{e}.w2.weight": ("layers.{n}.feed_forward.experts.{e}.w2.weight",),
}
GGUF_TRUNK: Table = {
    "embed_tokens.weight": ("token_embd.weight",),
    "norm.weight": ("output_norm.weight",),
    "lm_head.weight": ("output.weight",),
    "layers.{n}.input_layernorm.weight": ("blk.{n}.attn_norm.weight",),
    "layers.{n}.self_attn.qkv_proj.weight": (
        "blk.{n}.attn_q.weight",
        "blk.{n}.attn_k.weight",
        "blk.{n}.attn_v.weight",
    ),
    "layers.{n}.self_attn.o_proj.weight": ("blk.{n}.attn_output.weight",),
    "layers.{n}.post_attention_layernorm.weight": ("blk.{n}.ffn_norm.weight",),
    "layers.{n}.block_sparse_moe.gate.weight": ("blk.{n}.ffn_gate_inp.weight",),
}
GGUF: Mapping[str, Table] = {  # llama.cpp's files, which `tools.quantize` reads
    "experts stacked": {
        **GGUF_TRUNK,
        EXPERT + "w13.weight": ("blk.{n}.ffn_gate_exps.weight", "blk.{n}.ffn_up_exps.weight"),
        EXPERT + "w2.weight": ("blk.{n}.ffn_down_exps.weight",),
    },
    "experts stacked, gate and up in one": {
        **GGUF_TRUNK,
        EXPERT + "w13.weight": ("blk.{n}.ffn_gate_up_exps.weight",),
        EXPERT + "w2.weight": ("blk.{n}.ffn_down_exps.weight",),
    },
    "a tensor per expert": {  # until April 2024
        **GGUF_TRUNK,
        EXPERT + "w13.weight": ("blk.{n}.ffn_gate.{e}.weight", "blk.{n}.ffn_up.{e}.weight"),
        EXPERT + "w2.weight": ("blk.{n}.ffn_down.{e}.weight",),
    },
}
SPELLINGS: Mapping[str, Table] = {"HF": HF, "HF, experts stacked": HF_STACKED, "Mistral": MISTRAL}

# Tensors whose rows are in another order than ours; see `load.rotate_half_order`.
INTERLEAVED = {
    "layers.{n}.attention.wq.weight", "layers.{n}.attention.wk.weight",
    "blk.{n}.attn_q.weight", "blk.{n}.attn_k.weight",
}  # fmt: skip
# Endings of tensors that old exports have, and that follow from the configuration.
IGNORED = (".rotary_emb.inv_freq",)
GGUF_IGNORED = (".attn_rot_embd.weight",)


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `start + shape[0]` of a parameter. A norm has a row for each element.

    If `head_dim` is not 0, a head has that many rows, and the file has them in interleaved order.
    """

    parameter: str
    start: int
    shape: tuple[int, ...]
    head_dim: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a file should hold, and the rows that its bytes fill, in the order of the bytes."""

    shape: tuple[int, ...]
    fills: tuple[Rows, ...]


def stored_tensors(table: Table, config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint in this spelling, by name. Those of an expert follow each other.

    >>> tiny = ModelConfig(vocab=9, hidden=4, layers=1, heads=2, kv_heads=1, head_dim=2, ffn=3, experts=2,
    ...                    experts_per_token=1, context=8, rope_theta=1e4, norm_eps=1e-5)
    >>> hf = stored_tensors(HF, tiny)
    >>> hf["model.layers.0.self_attn.k_proj.weight"].fills[0]  # below the 2 * 2 rows of q
    Rows(parameter='layers.0.self_attn.qkv_proj.weight', start=4, shape=(2, 4), head_dim=0)
    >>> stacked = stored_tensors(HF_STACKED, tiny)["model.layers.0.mlp.experts.gate_up_proj"]
    >>> stacked.shape, [rows.parameter.removeprefix("layers.0.block_sparse_moe.") for rows in stacked.fills]
    ((2, 6, 4), ['experts.0.w13.weight', 'experts.1.w13.weight'])
    """
    shapes = parameter_rows(config)
    fills: dict[str, list[Rows]] = {}
    stacked = set()
    for template, n, e in instances(config):
        blocks, row = shapes[template]
        sources = table[template]
        start = 0
        for source, rows in zip(sources, blocks if len(sources) > 1 else (sum(blocks),), strict=True):
            name = source.format(n=n, e=e)
            head_dim = config.head_dim if source in INTERLEAVED else 0
            fills.setdefault(name, []).append(Rows(template.format(n=n, e=e), start, (rows, *row), head_dim))
            start += rows
            if "{e}" in template and "{e}" not in source:
                stacked.add(name)
    return {
        name: StoredTensor((len(rows), *rows[0].shape) if name in stacked else rows[0].shape, tuple(rows))
        for name, rows in fills.items()
    }
