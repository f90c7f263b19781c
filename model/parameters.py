"""Names and shapes of the network's parameters, in the order of written checkpoints.

A name with `{n}` stands for a parameter of each layer, and one with `{e}` for a parameter of each expert.
"""

from collections.abc import Iterator

from model.config import ModelConfig

EXPERT = "layers.{n}.block_sparse_moe.experts.{e}."  # what the names of an expert's matrices begin with
ATTENTION = ("layers.{n}.self_attn.qkv_proj.weight", "layers.{n}.self_attn.o_proj.weight")
EMBEDDINGS = "embed_tokens.weight"
NORM = "norm.weight"
HEAD = "lm_head.weight"
BEFORE_LAYERS = ("embed_tokens",)  # modules by which a model begins, and by which it ends
AFTER_LAYERS = ("norm", "lm_head")
GATE = ".gate.weight"  # what the names of routers' gates end with


def parameter_rows(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each parameter, the row counts of the tensors fused in it, and the shape of a row, () in a norm."""
    V, D, F, E, K = config.vocab, config.hidden, config.ffn, config.experts, config.head_dim
    H, G = config.heads, config.kv_heads
    return {
        "embed_tokens.weight": ((V,), (D,)),
        "norm.weight": ((D,), ()),
        "lm_head.weight": ((V,), (D,)),
        "layers.{n}.input_layernorm.weight": ((D,), ()),
        "layers.{n}.self_attn.qkv_proj.weight": ((H * K, G * K, G * K), (D,)),
        "layers.{n}.self_attn.o_proj.weight": ((D,), (H * K,)),
        "layers.{n}.post_attention_layernorm.weight": ((D,), ()),
        "layers.{n}.block_sparse_moe.gate.weight": ((E,), (D,)),
        "layers.{n}.block_sparse_moe.experts.{e}.w13.weight": ((F, F), (D,)),
        "layers.{n}.block_sparse_moe.experts.{e}.w2.weight": ((D,), (F,)),
    }


def copies(template: str, config: ModelConfig) -> int:
    """The number of names that this one stands for.

    >>> tiny = ModelConfig(vocab=9, hidden=4, layers=5, heads=2, kv_heads=1, head_dim=2, ffn=3, experts=2,
    ...                    experts_per_token=1, context=8, rope_theta=1e4, norm_eps=1e-5)
    >>> [copies(name, tiny) for name in ("norm.weight", "layers.{n}.gate", "layers.{n}.experts.{e}.w2")]
    [1, 5, 10]
    """
    return (config.layers if "{n}" in template else 1) * (config.experts if "{e}" in template else 1)


def instances(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Every parameter as (template, layer, expert), grouped by layer and within a layer by expert."""
    templates = list(parameter_rows(config))
    yield from ((t, 0, 0) for t in templates if "{n}" not in t)
    for n in range(config.layers):
        yield from ((t, n, 0) for t in templates if "{n}" in t and "{e}" not in t)
        for e in range(config.experts):
            yield from ((t, n, e) for t in templates if "{e}" in t)
