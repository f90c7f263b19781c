"""Tiny random Mixtrals, and the geometries that tests run them in."""

from dataclasses import replace

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mixtral import Mixtral

CPU = torch.device("cpu")

TINY = ModelConfig(
    vocab=96, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, experts=4, experts_per_token=2,
    context=128, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip

GEOMETRIES: dict[str, ModelConfig] = {
    "a head for every head": replace(TINY, kv_heads=4),
    "one kv head": replace(TINY, kv_heads=1),
    "8x7B's ratios": replace(
        TINY, vocab=250, hidden=128, heads=32, kv_heads=8, head_dim=4, ffn=448, experts=8, rope_theta=1e6
    ),
    "8x22B's ratios": replace(
        TINY,
        vocab=256,
        hidden=192,
        layers=4,
        heads=48,
        kv_heads=8,
        head_dim=4,
        ffn=512,
        experts=8,
        rope_theta=1e6,
    ),
    "heads wider than hidden": replace(TINY, head_dim=24, layers=3),
    "heads narrower than hidden": replace(TINY, hidden=40, head_dim=6, ffn=20),
    "odd vocabulary, one layer": replace(TINY, vocab=101, layers=1, hidden=36, head_dim=10, ffn=7),
    "1 of 4 experts": replace(TINY, experts_per_token=1),
    "3 of 8 experts": replace(TINY, experts=8, experts_per_token=3),
    "all experts, coarse norm": replace(TINY, experts=3, experts_per_token=3, norm_eps=0.05),
}


def random_model(config: ModelConfig, seed: int = 0) -> Mixtral:
    """A float32 Mixtral whose activations stay near 1 and whose routers and heads have clear preferences.

    No two tensors are alike and no norm is all ones, so swapping any two of them changes the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Mixtral(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + noise / 4)
            elif name.startswith("embed"):
                parameter.copy_(noise)
            else:
                parameter.copy_(
                    noise * (2 if "gate" in name or "qkv" in name else 1) / parameter.shape[1] ** 0.5
                )
    return model


def cast(model: Mixtral, dtype: torch.dtype) -> Mixtral:
    """A model in `dtype` with the same weights, rounded."""
    other = Mixtral(model.config, dtype)
    other.load_state_dict(model.state_dict())
    return other


def random_ids(config: ModelConfig, B: int, T: int, seed: int = 0) -> Tensor:  # [B, T]
    return torch.randint(config.vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def new_kv(model: Mixtral, B: int, capacity: int | None = None) -> KVCache:
    """An empty KV cache whose memory holds NaN, so that reading an unwritten place changes the logits."""
    kv = KVCache.allocate(model.config, B, capacity or model.config.context, model.lm_head.weight.dtype, CPU)
    for layer in kv.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    return kv


@torch.inference_mode()
def greedy(model: Mixtral, ids: Tensor, steps: int) -> Tensor:  # [B, T] -> [B, steps]
    """The likeliest continuation: the prompt in one pass, then one token at a time over a KV cache."""
    kv = new_kv(model, ids.shape[0])
    chosen = [model(ids, kv, last=True).argmax(-1)]  # [B, 1]
    while len(chosen) < steps:
        chosen.append(model(chosen[-1], kv).argmax(-1))
    return torch.cat(chosen, 1)
