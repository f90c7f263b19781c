"""Grouped-query attention (arXiv 2305.13245): H query heads share G heads of keys and values."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from model.config import ModelConfig
from model.kv_cache import LayerCache
from model.rope import Rope


class Attention(nn.Module):
    """Attention over a cache that belongs to the caller; without one, over the tokens at hand.

    The query, key and value projections are one matrix, rows in that order: one product instead of three, and
    one rotation for queries and keys together.
    """

    def __init__(self, config: ModelConfig, linear: Callable[[int, int], nn.Module]) -> None:
        """`linear(inputs, outputs)` makes a projection."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
        out = config.heads * config.head_dim
        self.qkv_proj = linear(config.hidden, qkv)
        self.o_proj = linear(out, config.hidden)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None, past: int
    ) -> Tensor:  # x [B, T, D] -> [B, T, D]
        B, T, _ = x.shape
        H, G = self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(B, T, H + 2 * G, self.head_dim).transpose(1, 2)  # [B, H + 2G, T, K]
        qk = rope(qkv[:, : H + G])  # [B, H + G, T, K]
        q, k, v = qk[:, :H], qk[:, H:], qkv[:, H + G :]  # [B, H, T, K], [B, G, T, K], [B, G, T, K]
        if cache is not None:
            k, v = cache.append(k, v, past)  # [B, G, past + T, K]
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, H * self.head_dim))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention of the last T of S tokens: q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K].

    `mask` [T, S], true where a token may look, is needed only on a CPU, and only when 1 < T < S: a single
    token sees everything, and T = S is the plain triangle.
    """
    B, H, T, K = q.shape
    if T == 1:  # the H/G queries of a group are rows against the same keys: nothing is repeated
        G = k.shape[1]
        return F.scaled_dot_product_attention(q.reshape(B, G, H // G, K), k, v).reshape(B, H, T, K)
    if q.is_cuda and k.shape[2] > T:
        return attend_behind(q, k, v)
    assert mask is not None or k.shape[2] == T, "is_causal would line the triangle up with the first keys"
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def attend_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` on a GPU for 1 < T < S.

    Hardly a kernel there takes both a mask and fewer heads of keys than of queries, and the way without a
    kernel writes out scores [H, T, S] in float32, twice and more. Flash attention itself lines its triangle
    up with the last keys, but `F.scaled_dot_product_attention` never asks for that. By this very call
    `torch.nn.attention.bias` does, which imports some 900 modules and allocates [2, T, S] numbers.
    """
    if q.shape[-1] % 8 == 0 and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True)):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]
    mask = triangle(q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def has_flash(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has a kernel that writes out neither scores [H, T, S] nor a
    mask."""
    return dtype.itemsize == 2 and capability >= (8, 0)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor | None:
    """Which of S tokens each of the last T may look at: [T, S] bool, or None where `attend` needs none.

    >>> causal_mask(2, 4, torch.device("cpu")).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    return None if T == 1 or T == S or device.type == "cuda" else triangle(T, S, device)


def triangle(T: int, S: int, device: torch.device) -> Tensor:  # [T, S] bool
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
