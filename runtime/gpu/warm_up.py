"""What the first request on a GPU would otherwise wait for: memory, compiled kernels, libraries and graphs.

An engine gets all of it once after loading, with the calls that requests make.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor

from model.kernels.matrices import FEW
from model.kv_cache import KVCache
from model.moe import Product
from model.quant.expert import BlobExperts
from runtime.errors import DeviceError, RequestError
from runtime.gpu.graphs import Work
from runtime.planning.memory import release, reserve
from runtime.runner import ModelRunner

ROWS = (1, 2, FEW + 1)  # each has a kernel of its own

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]


def prepare(runner: ModelRunner, progress: Bar | None = None) -> None:
    """Get a GPU ready. A CPU needs nothing more: memory comes as it is used, and kernels are compiled."""
    if runner.device.type == "cuda":
        take_planned(runner)
        warm_up(runner, progress)


def take_planned(runner: ModelRunner) -> None:
    """Have the allocator hold the rest of the planned memory: the KV caches, and a piece for activations."""
    release(runner.device)  # what loading took
    for _ in range(runner.plan.parallel):
        runner.give_kv(runner.new_kv())
    reserve(runner.device, runner.plan.workspace_bytes)


def warm_up(runner: ModelRunner, progress: Bar | None = None) -> None:
    """Compile kernels, set up libraries and make the first session's graphs. Nothing else differs afterwards.

    Raises `DeviceError` if the device fails.
    """
    kv = runner.take_kv()
    works = warm_ups(runner, kv)
    try:
        with progress(len(works)) if progress else nullcontext(None) as advance:
            for work in works:
                work()
                if advance:
                    advance(1)
    except RequestError as error:
        raise DeviceError(str(error)) from error
    if runner.cache:
        runner.cache.start_over()
    runner.give_kv(kv)


def warm_ups(runner: ModelRunner, kv: KVCache) -> list[Work]:
    """Calls after which nothing is left to compile. They add to `kv`.

    The router decides how many rows an expert gets, so one expert is computed by itself. So are attention's
    projections, and the head, which has a row for each token of a text that is scored. One layer and one
    expert stand for all, which are alike. Then a prompt and a token are computed, after which the decoder
    makes its graphs. A part of a model computes its own layers alone.
    """
    model, config = runner.model, runner.config
    block = model.blocks[0]
    resident = block.block_sparse_moe.experts
    experts = runner.cache.bound if runner.cache else cast(BlobExperts, resident).experts
    products: list[tuple[Product, int]] = [
        (block.self_attn.qkv_proj, config.hidden),
        (block.self_attn.o_proj, config.heads * config.head_dim),
        (experts[0], config.hidden),
    ]
    if model.heads:
        products.append((model.lm_head, config.hidden))
    zeros = partial(torch.zeros, dtype=model.dtype, device=model.device)
    works: list[Work] = [
        partial(alone, product, zeros(rows, width)) for product, width in products for rows in ROWS
    ]
    prompt = [0] * min(2, kv.capacity - 1)  # a context holds 2 tokens at least
    return works + [partial(add, runner, ids, kv) for ids in (prompt, [0])]


def add(runner: ModelRunner, ids: list[int], kv: KVCache) -> None:
    """Add tokens to `kv`, as requests do."""
    if runner.model.embeds and runner.model.heads:
        runner.forward(ids, kv)
    else:
        runner.alone(partial(add_to_part, runner, ids, kv))


def add_to_part(runner: ModelRunner, ids: list[int], kv: KVCache) -> None:
    """The same by this part of a model alone, whose neighbours are not asked for anything."""
    model = runner.model
    with torch.inference_mode():
        x = torch.zeros(len(ids), model.config.hidden, dtype=model.dtype, device=model.device)  # [T, D]
        if runner.decoder is not None and len(ids) == 1:
            runner.decoder.step(ids[0] if model.embeds else x, kv)
            return
        if model.embeds:
            x = model.embed(torch.tensor(ids, device=model.device))
        x = model.through(x[None], kv)
        if model.heads:
            model.logits(x, last=True)


def alone(product: Product, x: Tensor) -> None:
    """Compute a product and drop it."""
    with torch.inference_mode():
        product(x)
