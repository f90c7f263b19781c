"""Our configuration as Transformers has it."""

from typing import Any

from transformers import MixtralConfig

from model.config import ModelConfig

# We attend with PyTorch's fused kernels, so the oracle computes every formula step by step.
FORMULAS: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}


def their_config(config: ModelConfig) -> MixtralConfig:
    linear = {"rope_type": "linear", "factor": config.rope_factor}
    scaling = {"rope_type": "default"} if config.rope_factor == 1 else linear
    return MixtralConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        num_experts_per_tok=config.experts_per_token,
        num_local_experts=config.experts,
        rope_parameters={**scaling, "rope_theta": config.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        **FORMULAS,
    )
