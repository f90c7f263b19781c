"""Decoding on a GPU: a token's step as CUDA graphs, with one word from the host in each layer at most.

Where all experts are resident a step is one graph. Where they are not, it is cut behind each router: there
the host learns the choice, has missing experts copied, and tells the next graph by their slots where they
are. Both compute the same kernels on the same bytes, so they give the same bits.

A captured step allocates nothing, and reads nothing on the host but `inputs` and the slots.
"""

import gc
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels import step as kernels
from model.kv_cache import KVCache
from model.mixtral import Block, Mixtral
from model.quant.backends import fused
from model.quant.spec import ROWS
from runtime.experts.cache import ExpertCache
from runtime.gpu.graphs import CudaGraphs, Graphs, Work


def make_decoder(model: Mixtral, cache: ExpertCache | None, capture: bool) -> "Decoder | None":
    """The model's decoder, if the device it is on can have one."""
    device = model.embed_tokens.weight.device
    if unfit(model.config, device):
        return None
    return Decoder(model, cache, CudaGraphs(device), capture)


def unfit(config: ModelConfig, device: torch.device) -> str | None:
    """Why `Mixtral.step` of such a model cannot be computed on this device; None if it can."""
    c = config
    if c.hidden % ROWS or c.ffn % ROWS:
        return f"hidden {c.hidden} and ffn {c.ffn} are not multiples of {ROWS}"
    shape = kernels.unfit(c.heads, c.kv_heads, c.head_dim, c.hidden, c.experts, c.experts_per_token)
    return fused.unsupported(device) or shape


class Decoder:
    """One token at a time through a model."""

    def __init__(
        self, model: Mixtral, cache: ExpertCache | None, graphs: Graphs, capture: bool = True
    ) -> None:
        """`cache` holds the experts, where they are not resident. Without `capture` every step is put on the
        device launch by launch."""
        config, device = model.config, model.embed_tokens.weight.device
        self.model, self.cache, self.graphs, self.capturing = model, cache, graphs, capture
        model.prepare_step()
        self.routers = [cast(Block, block).block_sparse_moe.gate for block in model.layers]
        self.inputs = graphs.shared(2, dtype=torch.int64)  # the id, and how many tokens there are before it
        self.inputs_there = torch.zeros(2, dtype=torch.int64, device=device)
        most = 2 * config.experts_per_token + 2 * config.experts  # two layers ahead
        most = -(-most // 4) * 4  # every row begins at 16 bytes, so all are written by one kernel
        self.choices = graphs.shared(config.layers, most, dtype=torch.int32)
        self.numbers = self.choices.numpy()  # the same memory
        self.weights = [row[: config.experts_per_token].view(torch.float32) for row in self.choices]
        self.logits = torch.zeros(config.vocab, dtype=torch.float32, device=device)
        self.captured: weakref.WeakKeyDictionary[KVCache, list[Work]] = weakref.WeakKeyDictionary()

    def step(self, token: int, kv: KVCache) -> Tensor:
        """Add a token to the cache; return the logits behind it, [V] float32, in memory that the next step
        overwrites. Raises `TransferError` if an expert does not arrive, and `ValueError` if there is no room
        for a token."""
        limit = min(kv.capacity, self.model.config.context)
        if kv.length >= limit:
            raise ValueError(f"{kv.length} tokens and 1 more do not fit a context of {limit}")
        self.graphs.wait()  # the step before has to have read its inputs
        self.inputs[0], self.inputs[1] = token, kv.length
        captured = self.captured.get(kv)
        for number, work in enumerate(captured or self.parts(kv)):
            work()
            if self.cache is not None:
                self.attend_to_experts(self.cache, number)
        kv.length += 1
        if captured is None and self.capturing:
            self.capture(kv)
        return self.logits

    def attend_to_experts(self, cache: ExpertCache, part: int) -> None:
        """Behind that part of a step: its layer's choice is made, and the layer before it computed."""
        if part > 0:
            cache.computed_one(part - 1)
        if part < self.model.config.layers:
            self.graphs.wait()
            cache.provide(part, *self.choice(part))

    def choice(self, layer: int) -> tuple[list[int], Tensor, list[list[int]]]:
        """What has come to the host of a layer's `Choice`: ids, weights, and of each of the next layers the
        experts, likeliest first, as far as lookahead looks."""
        A, E = self.model.config.experts_per_token, self.model.config.experts
        row = self.numbers[layer, : 2 * A + self.routers[layer].distance * E].tolist()
        ahead = [row[i : i + E] for i in range(2 * A, len(row), E)]
        return row[A : 2 * A], self.weights[layer], ahead

    def parts(self, kv: KVCache) -> Iterator[Work]:
        """A step in as many parts as the host has to attend to, each to be run before the next is taken."""
        token, position = self.inputs_there[:1], self.inputs_there[1:]
        computing = self.model.step(token, position, kv)

        def part(layer: int) -> None:  # up to that layer's choice
            if layer == 0:
                kernels.fetch(self.inputs, self.inputs_there)
            result = next(computing)
            if isinstance(result, Tensor):
                self.logits.copy_(result[0])
            elif self.cache is not None and result.packed is not None:
                kernels.fetch(result.packed, self.choices[layer, : len(result.packed)])

        def whole() -> None:
            for layer in layers:
                part(layer)

        layers = range(self.model.config.layers + 1)
        return iter([whole]) if self.cache is None else (partial(part, layer) for layer in layers)

    def capture(self, kv: KVCache) -> None:
        """Behind a first step with this cache, which has made all that is made only once."""
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # it might free what the device still uses, or unlock memory, in the midst of a capture
        try:
            self.captured[kv] = [self.graphs.capture(work) for work in self.parts(kv)]
        except Exception as error:  # of PyTorch's, CUDA's or Triton's
            self.capturing = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"CUDA graphs cannot be made ({reason}): every step is launched piece by piece, which is "
                "slower; use --no-graphs to have it so without this message",
                RuntimeWarning,
                stacklevel=3,
            )
        finally:
            if collecting:
                gc.enable()
