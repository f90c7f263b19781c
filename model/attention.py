"""Grouped-query attention (arXiv 2305.13245): H query heads share G heads of keys and values."""

from collections.abc import Callable, Iterable, Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from model.config import ModelConfig
from model.kernels import step as kernels
from model.kernels.cpu import rowwise
from model.kv_cache import LayerKV, Stored
from model.rope import Rope
from model.rows import apart
from model.target import AMPERE, Target


class Attention(nn.Module):
    """Attention over the caller's keys and values, or without them over the given tokens alone.

    The query, key and value projections are one matrix, with rows in that order. So one product replaces
    three, and one rotation serves queries and keys.
    """

    def __init__(self, config: ModelConfig, linear: Callable[[int, int], nn.Module]) -> None:
        """`linear(inputs, outputs)` makes each of the two projections."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
        out = config.heads * config.head_dim
        self.qkv_proj = linear(config.hidden, qkv)
        self.o_proj = linear(out, config.hidden)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, kv: LayerKV | None, past: int
    ) -> Tensor:  # x [B, T, D] -> [B, T, D]
        B, T, _ = x.shape
        H, G = self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(B, T, H + 2 * G, self.head_dim).transpose(1, 2)  # [B, H + 2G, T, K]
        qk = rope(qkv[:, : H + G])  # [B, H + G, T, K]
        q, k = qk[:, :H], qk[:, H:]  # [B, H, T, K], [B, G, T, K]
        v = poisoned(qkv[:, H + G :], qk)  # [B, G, T, K]
        if kv is not None:
            k, v, scales = self.extend(kv, k, v, past)  # [B, G, past + T, K]
        else:
            scales = None
        out = attend(q, k, v, mask, scales)  # [B, H, T, K]
        return self.o_proj(out.transpose(1, 2).reshape(B, T, H * self.head_dim))

    def extend(self, kv: LayerKV, k: Tensor, v: Tensor, past: int) -> Stored:
        """Store T tokens' keys and values, [B, G, T, K] each. Returns all that attention is to see: codes if
        the kernels of a CPU will read them."""
        if kv.scales and goes_by_rows(k.dtype, k.device, self.head_dim, self.heads // self.kv_heads):
            return kv.store(k, v, past)
        return *kv.append(k, v, past), None

    def decode(self, x: Tensor, rope: Rope, kvs: Sequence[LayerKV], pasts: Sequence[int]) -> Tensor:
        """The same for one token of each of N texts, x [N, D] -> [N, D]. Text n has `pasts[n]` so far."""
        N, H, G = len(x), self.heads, self.kv_heads
        qkv = apart(self.qkv_proj, x).view(N, H + 2 * G, 1, self.head_dim)
        qk = rope(qkv[:, : H + G])  # [N, H + G, 1, K]
        q, k = qk[:, :H], qk[:, H:]  # [N, H, 1, K], [N, G, 1, K]
        v = poisoned(qkv[:, H + G :], qk)  # [N, G, 1, K]
        news = zip(k.split(1), v.split(1), kvs, pasts, strict=True)
        out = attend_each(q, G, (self.extend(kv, k, v, past) for k, v, kv, past in news))  # [N, H, 1, K]
        return apart(self.o_proj, out.view(N, H * self.head_dim))

    def step(self, x: Tensor, rope: Rope, kv: LayerKV, position: Tensor) -> Tensor:  # [1, D] -> [1, D]
        """The same for one token in a step on a GPU. position [1] int64 is the token's place in `kv`."""
        qkv = self.qkv_proj(x)  # [1, (H + 2 G) K]
        q = kernels.rotate_and_append(qkv, rope.cos, rope.sin, kv.k, kv.v, position, kv.scales)  # [H, K]
        return self.o_proj(kernels.attend(q, kv.k, kv.v, position, kv.scales))


def poisoned(v: Tensor, qk: Tensor) -> Tensor:  # [B, G, T, K], [B, H + G, T, K] -> [B, G, T, K]
    """The values unchanged, or those of a text all NaN if any of its queries or keys is not finite.

    Attention alone can hide a number that is not finite. A CPU's kernel gives zeros where no score is finite,
    and a key that overflowed can look like one that is masked. A value of NaN reaches every token that sees
    it, at any score, and through the KV cache every later token.
    """
    qk = qk.detach()
    extremes = qk.aminmax() if len(qk) == 1 else qk.flatten(1).aminmax(dim=1)  # [B] each
    least, greatest = (e.view(-1, 1, 1, 1) for e in extremes)
    return torch.addcmul(v, least, greatest, value=0)  # v + 0 * least * greatest


Scales = tuple[Tensor, Tensor] | None  # of keys and values, [B, G, C] float32 each, if these are codes


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scales: Scales = None) -> Tensor:
    """Causal attention of the last T of S tokens: q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K].

    `mask` [T, S] is true where a token may look. Only a CPU needs it, and only if 1 < T < S, because a single
    token sees everything and T = S is the plain triangle.
    """
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    if goes_by_rows(q.dtype, q.device, K, H // G):
        return attend_by_rows(q, k, v, scales)
    assert scales is None, "only these kernels read codes"
    if T == 1:  # the H/G queries of a group become rows against the same keys, so no keys are repeated
        q = q.reshape(B, G, H // G, K)
    if takes_flash(q, k, v):
        out = attend_by_flash(q, k, v, causal=T > 1)
    elif T == 1:
        out = F.scaled_dot_product_attention(q, k, v)
    elif q.is_cuda:
        out = attend_by_scores(q, k, v)
    else:
        assert mask is not None or S == T, "is_causal would align the triangle with the first keys"
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.reshape(B, H, T, K)


def attend_each(q: Tensor, G: int, news: Iterable[Stored]) -> Tensor:  # [N, H, 1, K] -> the same
    """Attention of one token of each of N texts, to keys and values [1, G, S, K] each. `news` stores a token
    when it is asked for the next text. One text is decoded at a time, if any has to be."""
    H, K = q.shape[1], q.shape[3]
    if not goes_by_rows(q.dtype, q.device, K, H // G):
        rows = zip(q.split(1), news, strict=True)
        return torch.cat([attend(row, k, v, None) for row, (k, v, _) in rows])
    texts = list(news)
    lasts = [(aligned(k[0]), aligned(v[0]), k.shape[2] - 1, 1) for k, v, _ in texts]
    scales = [(ks[0], vs[0]) for *_, coded in texts if coded for ks, vs in [coded]]
    return rowwise.attend_rows(q[:, :, 0], lasts, scales or None)[:, :, None]


def attend_by_rows(q: Tensor, k: Tensor, v: Tensor, scales: Scales) -> Tensor:  # [B, H, T, K]
    """Causal attention by the kernels of a CPU, which compute each row by itself."""
    (B, H, T, K), S = q.shape, k.shape[2]
    texts = [(aligned(k[b]), aligned(v[b]), S - T, T) for b in range(B)]
    of = None if scales is None else list(zip(*scales, strict=True))
    out = rowwise.attend_rows(q.transpose(1, 2).reshape(B * T, H, K), texts, of)
    return out.view(B, T, H, K).transpose(1, 2)


def aligned(x: Tensor) -> Tensor:  # [G, S, K]
    """The same, where a group's tokens lie one after the other."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def goes_by_rows(dtype: torch.dtype, device: torch.device, head_dim: int, heads: int) -> bool:
    """Whether the kernels of a CPU compute attention. They have no gradients."""
    return not torch.is_grad_enabled() and rowwise.takes(dtype, device, head_dim, heads)


def takes_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the tensors are on a GPU whose flash attention takes them."""
    if not q.is_cuda or q.shape[-1] % 8:
        return False
    with torch.cuda.device_of(q):  # PyTorch looks at the current device
        return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1]))


def attend_by_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:  # [B, H, T, K]
    """Flash attention by its own operator, for any T.

    `F.scaled_dot_product_attention` will not do. From compute capability 9.0 on it prefers cuDNN, which makes
    and keeps a plan for every length of a prompt in every thread. And it never has flash attention align the
    triangle with the last keys, as the operator does. `torch.nn.attention.bias` makes the same call, but
    imports some 900 modules and allocates [2, T, S] numbers.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)[0]


SCORED = 64  # tokens whose scores `attend_by_scores` holds at a time


def attend_by_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, H, T, K]
    """Causal attention in float32 on a GPU without flash attention, a few tokens at a time.

    PyTorch's own way would hold all scores [H, T, S] three times, and repeat keys and values for H heads.
    """
    T, S = q.shape[2], k.shape[2]
    k, v, out = k.float(), v.float(), torch.empty_like(q)
    for start in range(0, T, SCORED):
        end = min(start + SCORED, T)
        seen = S - T + end
        out[:, :, start:end] = attend_at_once(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen])
    return out


def attend_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, H, T, K] float32
    """The same for a few tokens, with all scores in memory. k and v are float32."""
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    wide = (q.float() * K**-0.5).reshape(B, G, -1, K)  # [B, G, H/G T, K]
    scores = (wide @ k.mT).view(B, H, T, S)
    scores.masked_fill_(triangle(T, S, q.device).logical_not_(), -torch.inf)
    weights = scores.softmax(-1).view(B, G, -1, S)
    return (weights @ v).view(B, H, T, K)


class Attending(Enum):
    """How attention of a prompt is computed, which decides how much memory it takes."""

    ROWS = "on a CPU with kernels: scores of a few tokens for each thread"
    MASK = "on another CPU: a mask [T, S] for each chunk but the first"
    FLASH = "on a GPU with flash attention: neither a mask nor scores"
    SCORES = "on another GPU: scores of a few tokens"

    @staticmethod
    def of(config: ModelConfig, dtype: torch.dtype, target: Target) -> "Attending":
        """The way on this device."""
        if target.capability is None:  # a CPU
            heads = config.heads // config.kv_heads
            by_rows = rowwise.takes(dtype, target.device, config.head_dim, heads)
            return Attending.ROWS if by_rows else Attending.MASK
        fits = config.head_dim % 8 == 0 and config.head_dim <= 256 and dtype.itemsize == 2
        return Attending.FLASH if fits and target.capability >= AMPERE else Attending.SCORES

    def bytes(self, config: ModelConfig, dtype: torch.dtype, T: int, S: int) -> int:
        """The bytes that attention of the last T of S tokens takes, beside q, k, v and its result."""
        H, G, K = config.heads, config.kv_heads, config.head_dim
        if self is Attending.ROWS:
            return rowwise.attend_bytes(T, H, G, K, S)
        if self is Attending.MASK:
            return T * S * (1 + dtype.itemsize)  # as bool, and as the kernel's dtype
        if self is Attending.FLASH:
            return 0
        row = H * (2 * S + 2 * K) * 4 + 2 * S  # scores, weights, queries, sums, and a mask while it is made
        wide = 0 if dtype == torch.float32 else 2 * G * S * K * 4  # keys and values
        return wide + min(T, SCORED) * row


def causal_mask(T: int, S: int, device: torch.device, by_rows: bool = False) -> Tensor | None:
    """Which of S tokens each of the last T may look at: [T, S] bool, or None if `attend` needs no mask.

    >>> causal_mask(2, 4, torch.device("cpu")).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    return None if T == 1 or T == S or by_rows or device.type == "cuda" else triangle(T, S, device)


def triangle(T: int, S: int, device: torch.device) -> Tensor:  # [T, S] bool
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
