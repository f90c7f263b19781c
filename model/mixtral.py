"""Mixtral (arXiv 2401.04088): a decoder-only transformer whose feed-forward layers are mixtures of experts.

Letters used for shapes, in the network:

    B batch   T tokens        D hidden      H query heads  G key/value heads    K head dim
    E experts A per token     F ffn         L layers       N = B * T            V vocabulary
    S tokens attended to: those in the KV cache and the T new ones
    C capacity of a KV cache  n rows of one expert         d layers that a router looks ahead

`model/quant` has letters of its own for a matrix: N x K, J groups in a row, and M rows to multiply it with.

Words, each with one meaning:

    kv             keys and values of a text: a `KVCache` has all layers', a `LayerKV` one layer's
    cache          experts: the device's slots and what fills them; of keys and values we say "KV cache"
    text           a prompt and what follows it, with a KV cache of its own; `decode` takes several
    forward        a pass of one or more tokens through all layers
    step           the forward of one decoded token (on a GPU, `Mixtral.step`)
    choose         what a router does for a token
    slot           one expert's place on the device; `slots` is a count of them
    blob           one expert as a run of bytes
    berth          one expert's place in host memory
    pool, arena    the memory of all slots, on the device; of all berths, in host memory
    tiers          slots, berths and files, if not every expert has a berth
    demand, guess  the copy of an expert that is needed, or that will probably be
    spare          a slot of no layer, for guesses and for experts that leave
    pin            keep a slot's expert until it has been computed
    stall          computing waits for a copy
    trunk          what every token needs: all but the experts and the KV cache
    resident       with all experts on the device; otherwise they are offloaded
    part           some consecutive layers, as a model of its own (`model.part`)
    spec           a weight format, such as 4 or 3g128 (`QuantSpec`)
    ..._bytes      a quantity in bytes
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from model.attention import Attention, causal_mask, goes_by_rows
from model.config import ModelConfig
from model.kernels import step as kernels
from model.kv_cache import KVCache, LayerKV
from model.linear import Linear
from model.moe import Experts, ResidentExperts, SparseMoE, StepExperts
from model.rope import Rope
from model.router import Choice, seen_from
from model.rows import apart


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), taken in float32, rounded to x's dtype, then scaled."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden, dtype=dtype, device=device))
        self.eps = torch.tensor([config.norm_eps], dtype=torch.float32, device=device)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # cheaper to call than a mean of squares
        inverse = torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt()  # 1 / root mean square
        return (wide * inverse).to(x.dtype) * self.weight

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [1, D] each
        """In a step on a GPU: x + y, which is the new residual stream, and the norm of that."""
        return kernels.add_and_norm(x, y, self.weight, self.eps)


class Block(nn.Module):
    """One layer: attention, then experts. Each reads a normed copy of x and is added to x."""

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
        self, x: Tensor, rope: Rope, mask: Tensor | None, kv: LayerKV | None, past: int
    ) -> Tensor:  # [B, T, D] -> [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, kv, past)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))

    def decode(self, x: Tensor, rope: Rope, kvs: Sequence[LayerKV], pasts: Sequence[int]) -> Tensor:
        """The same for one token of each of N texts, [N, D] -> [N, D]."""
        x = x + self.self_attn.decode(self.input_layernorm(x), rope, kvs, pasts)
        return x + self.block_sparse_moe.decode(self.post_attention_layernorm(x))


class Mixtral(nn.Module):
    """Token ids to logits.

    Parameters are named as in HF checkpoints, without the leading `model.`, but for two fusions: `qkv_proj`
    has the rows of q, k and v, and `w13` those of w1 and w3. `model.checkpoint.pieces` holds the table.

    `experts(layer)` provides a layer's experts. `linear(inputs, outputs)` makes attention's projections, and
    `head(inputs, outputs)` makes the head. By default they are parameters of this module. Weights are
    uninitialized. The caller fills them.

    A part of a model that begins after other layers does not have the `embeds`, and one that ends before
    others has neither norm nor head (`heads`). Its caller uses the pieces that `forward` and `decode` are
    made of.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        experts: Callable[[int], Experts] | None = None,
        linear: Callable[[int, int], nn.Module] | None = None,
        head: Callable[[int, int], nn.Module] | None = None,
        embeds: bool = True,
        heads: bool = True,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config, self.embeds, self.heads = config, embeds, heads
        self.dtype, self.device = dtype, device
        provide = experts or (lambda layer: ResidentExperts(config, dtype, device))
        plain = partial(Linear, dtype=dtype, device=device)
        if embeds:
            embeddings = torch.empty(config.vocab, config.hidden, dtype=dtype, device=device)
            self.embed_tokens = nn.Embedding(config.vocab, config.hidden, _weight=embeddings)
        self.layers = nn.ModuleList(
            Block(config, linear or plain, provide(layer), dtype, device) for layer in range(config.layers)
        )
        if heads:
            self.norm = RMSNorm(config, dtype, device)
            self.lm_head = (head or plain)(config.hidden, config.vocab)
        self.rope = Rope.table(
            config.context, config.head_dim, config.rope_theta, dtype, device, config.rope_factor
        )

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, module) for module in self.layers]

    def forward(self, ids: Tensor, kv: KVCache | None = None, last: bool = False) -> Tensor:
        """Logits [B, T, V] for ids [B, T], or with `last` only the last token's, [B, 1, V].

        With `kv`, the ids follow the tokens that it holds and are added to it. Without it, they are the whole
        text. Raises `ValueError` if they do not fit.
        """
        return self.logits(self.through(self.embed(ids), kv), last)

    def embed(self, ids: Tensor) -> Tensor:  # [...] -> [..., D]
        return self.embed_tokens(ids)

    def through(self, x: Tensor, kv: KVCache | None = None) -> Tensor:  # [B, T, D] -> [B, T, D]
        """All layers, of which `kv` gets keys and values. Raises as `forward` does."""
        c, (B, T, _) = self.config, x.shape
        past, end = self.room(B, T, kv)
        rope = self.rope.at(past, end)
        by_rows = goes_by_rows(x.dtype, x.device, c.head_dim, c.heads // c.kv_heads)
        mask = causal_mask(T, end, x.device, by_rows)
        for layer, block in enumerate(self.layers):
            x = block(x, rope, mask, kv.layers[layer] if kv else None, past)
        if kv:
            kv.length = end
        return x

    def logits(self, x: Tensor, last: bool = False) -> Tensor:  # [B, T, D] -> [B, T, V]
        """Those of hidden states that have gone through all layers, or with `last` [B, 1, V]."""
        if last:
            x = x[:, -1:]
        return self.lm_head(self.norm(x))

    def decode(self, ids: Tensor, kvs: Sequence[KVCache]) -> Tensor:
        """The next token of each of N texts: logits [N, V] after ids [N], which are added to `kvs`.

        Attention sees one text at a time. All else is computed for all texts at once, so an expert is brought
        once for all of them. On a CPU, a text's logits have the same bits alone and beside any others.
        Raises `ValueError` if an id does not fit.
        """
        return self.logits_each(self.through_each(self.embed(ids), kvs))

    def through_each(self, x: Tensor, kvs: Sequence[KVCache]) -> Tensor:  # [N, D] -> [N, D]
        """`through` for one token of each of N texts."""
        pasts = [self.room(1, 1, kv)[0] for kv in kvs]
        rope = self.rope.of(pasts)
        for layer, block in enumerate(self.blocks):
            x = block.decode(x, rope, [kv.layers[layer] for kv in kvs], pasts)
        for kv in kvs:
            kv.length += 1
        return x

    def logits_each(self, x: Tensor) -> Tensor:  # [N, D] -> [N, V]
        return apart(self.lm_head, self.norm(x))

    def step(self, given: Tensor, position: Tensor, kv: KVCache) -> Iterator[Choice | Tensor | None]:
        """What `forward` computes for one id, on a GPU. Yields L choices, one a layer, then logits [1, V].

        `given` and position, [1] int64 each on the model's device, are the id and the number of tokens that
        `kv` holds. A part without embeddings is given the hidden state [1, D] instead of the id, and one
        without a head yields that instead of logits. The caller moves `kv.length`. After each choice, it can
        bring the chosen experts to the device before it resumes this generator. If the host computes some of
        them, there is a second stop, a None, where the device has computed the others and needs the host's
        sum.

        This is a second way because a step is captured as CUDA graphs, which replay launches without Python.
        So no line here depends on the position or on a choice, nothing waits for the device, and one launch
        does the work of some ten small calls in `forward`.
        """
        x = self.embed(given) if self.embeds else given  # [1, D]
        y = torch.zeros_like(x)  # what the last sublayer adds to the residual stream
        for layer, block in enumerate(self.blocks):
            x, h = block.input_layernorm.step(x, y)
            y = block.self_attn.step(h, self.rope, kv.layers[layer], position)
            x, h = block.post_attention_layernorm.step(x, y)
            choice = block.block_sparse_moe.gate.step(h)
            yield choice
            experts = cast(StepExperts, block.block_sparse_moe.experts)  # those as parameters have no step
            y = experts.step(h, choice)
            if (rest := experts.rest) is not None:
                yield None
                y = rest(y)
        yield self.lm_head(self.norm.step(x, y)[1]) if self.heads else x + y

    def room(self, B: int, T: int, kv: KVCache | None) -> tuple[int, int]:
        """The number of tokens without and with T new ones. Raises `ValueError` if they do not fit."""
        if kv is not None and kv.batch != B:
            raise ValueError(f"a batch of {B} for a KV cache of {kv.batch}")
        past, limit = 0, self.config.context
        if kv is not None:
            past, limit = kv.length, min(kv.capacity, limit)
        if past + T > limit:
            raise ValueError(f"{past} tokens and {T} more do not fit a context of {limit}")
        return past, past + T

    @torch.no_grad()
    def look_ahead(self, distance: int) -> None:
        """Have every router rank the experts of the next `distance` layers, too. Call it after the weights
        are loaded."""
        blocks = self.blocks
        for layer, block in enumerate(blocks):
            mine = block.post_attention_layernorm.weight.detach()
            block.block_sparse_moe.gate.look_ahead(
                [
                    seen_from(mine, later.post_attention_layernorm.weight, later.block_sparse_moe.gate.weight)
                    for later in blocks[layer + 1 : layer + 1 + distance]
                ]
            )

    def prepare_step(self) -> None:
        """Prepare routers for `step`. Call it after the weights are loaded."""
        for block in self.blocks:
            block.block_sparse_moe.gate.prepare_step()
