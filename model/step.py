"""One token through the network, with every number that changes from token to token in the device's memory.

This is what `Mixtral.forward` computes for one id, written so that it can be captured as a CUDA graph, whole
or in parts: no line of it depends on where the token stands or which experts it chooses, and nothing waits.
Its products and small kernels are those of `model.quant.backends`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from model.attention import Attention
from model.config import ModelConfig
from model.kernels import step as kernels
from model.kv_cache import KVCache, LayerCache
from model.mixtral import Block, Mixtral, RMSNorm
from model.quant.backends import fused
from model.quant.spec import ROWS
from model.rope import Rope


@dataclass(frozen=True)
class Choice:
    """What the router of a layer says of one token. All of it is in `all`, to be read in one transfer.

    >>> choice = Choice.split(torch.tensor([0, 0, 3, 1, 2, 0, 1, 3], dtype=torch.int32), chosen=2)
    >>> choice.ids.tolist(), choice.weights.tolist(), choice.ranking.tolist()
    ([3, 1], [0.0, 0.0], [2, 0, 1, 3])
    """

    all: Tensor  # [2 A + d E] int32
    weights: Tensor  # [A] float32, adding up to 1
    ids: Tensor  # [A] int32, the largest weight's first
    ranking: Tensor  # [d E] int32: for each of d later layers its experts, the likeliest first

    @staticmethod
    def split(all: Tensor, chosen: int) -> "Choice":
        return Choice(all, all[:chosen].view(torch.float32), all[chosen : 2 * chosen], all[2 * chosen :])


Route = Callable[[int, Tensor], Choice]  # (layer, x [1, D])


class StepExperts(Protocol):
    """A layer's experts, for one token whose choice the host need not know."""

    def one(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [1, D], ids [A] int32, weights [A] float32 -> [1, D], summed as `model.moe.Experts` promises. Who
        keeps experts elsewhere has to bring these to the device before this is computed."""
        ...


def step(
    model: Mixtral, token: Tensor, position: Tensor, cache: KVCache, route: Route
) -> Iterator[Choice | Tensor]:
    """The parts of a step, each computed when the next one is asked for: L choices, at each of which the
    layer's experts are yet to be computed, and then the logits [1, V].

    token and position [1] int64, on the model's device: the id, and how many tokens the cache holds. Its
    `length` is neither read nor moved.
    """
    x = model.embed_tokens(token)  # [1, D]
    y = torch.zeros_like(x)  # what is to be added to it
    for layer, module in enumerate(model.layers):
        block = cast(Block, module)
        x, h = add_and_norm(x, y, block.input_layernorm)
        y = attend(h, block.self_attn, model.rope, cache.layers[layer], position)
        x, h = add_and_norm(x, y, block.post_attention_layernorm)
        choice = route(layer, h)
        yield choice
        experts = cast(StepExperts, block.block_sparse_moe.experts)
        y = experts.one(h, choice.ids, choice.weights)
    yield model.lm_head(add_and_norm(x, y, model.norm)[1])


def add_and_norm(x: Tensor, y: Tensor, module: RMSNorm) -> tuple[Tensor, Tensor]:  # [1, D] each
    """The residual stream with y, and its norm."""
    return kernels.add_and_norm(x, y, module.weight, module.eps)


def attend(x: Tensor, module: Attention, rope: Rope, cache: LayerCache, position: Tensor) -> Tensor:
    """[1, D] -> [1, D], behind adding the token to the cache."""
    qkv = module.qkv_proj(x)  # [1, (H + 2 G) K]
    q = kernels.rotate_and_append(qkv, rope.cos, rope.sin, cache.k, cache.v, position)  # [H, K]
    return module.o_proj(kernels.attend(q, cache.k, cache.v, position))


def router(model: Mixtral, ahead: Sequence[Tensor | None] | None = None) -> Route:
    """Each layer's own gate, and beneath it the gates `ahead` [d * E, D] of later layers, if there are any.
    A gate gives the same bits whatever is beneath it."""
    c, gates = model.config, []
    for layer, module in enumerate(model.layers):
        own = cast(Block, module).block_sparse_moe.gate.weight
        later = ahead[layer] if ahead else None
        gates.append(own if later is None else torch.cat([own, later]))  # [(1 + d) E, D]
    return partial(choose, gates, c.experts, c.experts_per_token)


def choose(gates: Sequence[Tensor], experts: int, chosen: int, layer: int, x: Tensor) -> Choice:
    return Choice.split(kernels.route(x, gates[layer], experts, chosen), chosen)


def unfit(config: ModelConfig, device: torch.device) -> str | None:
    """Why a step of such a model cannot be computed on this device; None if it can."""
    c = config
    if c.hidden % ROWS or c.ffn % ROWS:
        return f"hidden {c.hidden} and ffn {c.ffn} are not multiples of {ROWS}"
    shape = kernels.unfit(c.heads, c.kv_heads, c.head_dim, c.hidden, c.experts, c.experts_per_token)
    return fused.unsupported(device) or shape
