"""Shapes of known models, to plan and measure without a checkpoint."""

from dataclasses import replace

from model.config import ModelConfig

MIXTRAL_8X7B = ModelConfig(
    vocab=32000, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, experts=8,
    experts_per_token=2, context=32768, rope_theta=1e6, norm_eps=1e-5,
)  # fmt: skip
SHAPES = {
    "mixtral-8x7b": MIXTRAL_8X7B,
    "mixtral-8x22b": replace(
        MIXTRAL_8X7B, vocab=32768, hidden=6144, layers=56, heads=48, ffn=16384, context=65536
    ),
    "quarter": replace(  # a quarter of Mixtral-8x7B's width and half of its layers
        MIXTRAL_8X7B, hidden=1024, layers=16, heads=8, kv_heads=2, ffn=3584, context=4096
    ),
}
