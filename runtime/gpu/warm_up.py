"""What the first request on a GPU would wait for: compiling kernels, setting up libraries, making graphs. An
engine does it once after loading, with what requests use."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.mixtral import Block, Mixtral
from model.moe import Product
from model.quant.backends.fused import FEW
from runtime.gpu.graphs import Work

ROWS = (1, 2, FEW + 1)  # each of these is computed another way


def warm_ups(
    model: Mixtral, expert: Product, kv: KVCache, forward: Callable[[list[int], KVCache], Tensor]
) -> list[Work]:
    """Calls after which nothing is left to compile. They add to the KV cache.

    The router decides how many rows an expert gets. So `expert` is computed by itself, whatever is in it, and
    so are attention's projections, which are alike in all layers. `forward` then computes a prompt and a
    token, after which a decoder makes its graphs.
    """
    attention = cast(Block, model.layers[0]).self_attn
    hidden, out = model.config.hidden, model.config.heads * model.config.head_dim
    products: list[tuple[Product, int]] = [
        (attention.qkv_proj, hidden), (attention.o_proj, out), (expert, hidden),
    ]  # fmt: skip
    like = model.embed_tokens.weight.detach()
    works: list[Work] = [
        partial(alone, product, like.new_zeros(rows, width)) for product, width in products for rows in ROWS
    ]
    prompt = [0] * min(2, kv.capacity - 1)  # a context holds 2 tokens at least
    return works + [partial(forward, ids, kv) for ids in (prompt, [0])]


def alone(product: Product, x: Tensor) -> None:
    """A product whose result nobody needs."""
    with torch.inference_mode():
        product(x)
