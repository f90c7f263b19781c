"""Mixtral (arXiv 2401.04088): a decoder-only transformer whose feed-forward layers are mixtures of experts.

Letters used for shapes, here and everywhere:

    B batch   T tokens        D hidden      H query heads  G key/value heads    K head dim
    E experts A per token     F ffn         L layers       N = B * T            V vocabulary
    S tokens attended to: those in the cache and the T new ones
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from model.attention import Attention, causal_mask
from model.config import ModelConfig
from model.kv_cache import KVCache, LayerCache
from model.linear import Linear
from model.moe import Experts, ResidentExperts, SparseMoE
from model.rope import Rope


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): in float32, rounded to x's dtype, then scaled."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden, dtype=dtype, device=device))
        self.eps = torch.tensor([config.norm_eps], dtype=torch.float32, device=device)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # cheaper to call than a mean of squares
        inverse = torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt()  # 1 / root mean square
        return (wide * inverse).to(x.dtype) * self.weight


class Block(nn.Module):
    """One layer: attention, then experts, each on a normed copy that is added back."""

    def __init__(
        self,
        config: ModelConfig,
        linear: Callable[[int, int], nn.Module],
        experts: Experts,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, dtype, device)
        self.self_attn = Attention(config, linear)
        self.post_attention_layernorm = RMSNorm(config, dtype, device)
        self.block_sparse_moe = SparseMoE(config, experts, device)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None, past: int
    ) -> Tensor:  # [B, T, D] -> [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, past)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Mixtral(nn.Module):
    """Token ids to logits.

    Parameters are named as in HF checkpoints, less the leading `model.`, and with two fusions: q, k, v are
    rows of `qkv_proj`; w1, w3 are rows of `w13`. `model.checkpoint.pieces` holds the table.

    `experts(layer)` provides a layer's experts, and `linear(inputs, outputs)` makes attention's projections;
    by default all of these are parameters of this module. Weights are left as memory happens to be: whoever
    makes a model fills it.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        experts: Callable[[int], Experts] | None = None,
        linear: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        provide = experts or (lambda layer: ResidentExperts(config, dtype, device))
        linear = linear or partial(Linear, dtype=dtype, device=device)
        embeddings = torch.empty(config.vocab, config.hidden, dtype=dtype, device=device)
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden, _weight=embeddings)
        self.layers = nn.ModuleList(
            Block(config, linear, provide(layer), dtype, device) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config, dtype, device)
        self.lm_head: nn.Module = Linear(config.hidden, config.vocab, dtype, device)  # packed, perhaps
        self.rope = Rope.table(config.context, config.head_dim, config.rope_theta, dtype, device)

    def forward(self, ids: Tensor, cache: KVCache | None = None, last: bool = False) -> Tensor:
        """Logits [B, T, V] for ids [B, T]; only the last token's, [B, 1, V], with `last`.

        With a cache the ids follow the tokens that it holds, and are added to it; without, they are the whole
        text. Raises `ValueError` if they do not fit.
        """
        B, T = ids.shape
        if cache is not None and cache.batch != B:
            raise ValueError(f"a batch of {B} for a cache of {cache.batch}")
        past = cache.length if cache else 0
        end = past + T
        limit = min(cache.capacity, self.config.context) if cache else self.config.context
        if end > limit:
            raise ValueError(f"{past} tokens and {T} more do not fit a context of {limit}")
        rope, mask = self.rope.at(past, end), causal_mask(T, end, ids.device)
        x = self.embed_tokens(ids)  # [B, T, D]
        for layer, block in enumerate(self.layers):
            x = block(x, rope, mask, cache.layers[layer] if cache else None, past)
        if cache:
            cache.length = end
        if last:
            x = x[:, -1:]
        return self.lm_head(self.norm(x))
