"""Decoding on a GPU: each token's `Mixtral.step`, captured as CUDA graphs.

With all experts resident, a step is one graph. Otherwise it is cut after each router into parts, because only
the host can bring a missing expert. A token then goes this way:

1. The host writes the token's id and position to pinned memory, and launches part 0.
2. Part 0 fetches the two numbers, computes layer 0 up to its router, and writes the choice to pinned memory.
3. The host waits for part 0 and reads the choice. The cache queues copies of missing experts ahead of the
   kernels to come, and writes to pinned memory which slots the chosen experts are in.
4. The host launches part 1, which fetches the slots, computes layer 0's experts, and then layer 1 up to its
   router. To this graph a hit and a miss are the same.
5. This repeats for every layer. The last part ends with the logits.

If the model is a `model.part.Part`, a step may begin with a hidden state instead of an id, which the host
launches a copy of before part 0, and may end with one instead of logits.

If the host computes some of the missing experts, a layer has one more part. Part 0 also writes what the
experts take to pinned memory. Part 1 leaves out the host's experts, and ends after the layer's others. Part 2
fetches the sum that the host has written to pinned memory by then, adds it, and goes on.

With a new KV cache, the first step launches its kernels one by one. Then its parts are captured, and later
steps replay them. A captured part allocates nothing, and reads nothing of the host's but pinned memory. One
graph or many, the same kernels read the same bytes, so they give the same bits.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels import launching
from model.kernels import step as kernels
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.quant.spec import ROWS
from model.target import Target
from runtime.gpu.graphs import CudaGraphs, Graphs, Work

MAX_LOOKAHEAD = 2  # layers


class DecoderCache(Protocol):
    """What a decoder asks of an expert cache."""

    @property
    def divided(self) -> bool:
        """Whether the host may compute some of a token's experts, so that a layer's are two parts."""
        ...

    def give(self, x: Tensor) -> None:
        """Launch what brings x [1, D], which a layer's experts take, to the host. Only if `divided`."""
        ...

    def provide(
        self, layer: int, ids: list[int], weights: Tensor, ahead: list[list[int]]
    ) -> Sequence[Callable[[], object]]:
        """Bring a token's experts to the device, ahead of all kernels that are launched from now on.

        The layer's router chose `ids` with `weights` [A], on the host, and ranks the experts of the next
        layers in `ahead`. The caller launches the layer's parts, and calls one of the results after each. The
        last one allows the slots to be reused. If `divided`, the first one waits until the host has computed
        its experts. Raises `TransferError` if an expert does not arrive.
        """
        ...


def make_decoder(model: Mixtral, cache: DecoderCache | None, capture: bool) -> "Decoder | None":
    """The model's decoder, or None if its device cannot have one."""
    if unfit(model.config, model.device, model.dtype):
        return None
    return Decoder(model, cache, CudaGraphs(model.device), capture)


def unfit(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this device cannot compute `Mixtral.step` of such a model in `dtype`; None if it can."""
    c = config
    if c.hidden % ROWS or c.ffn % ROWS:
        return f"hidden {c.hidden} and ffn {c.ffn} are not multiples of {ROWS}"
    shape = kernels.unfit(c.heads, c.kv_heads, c.head_dim, c.hidden, c.experts, c.experts_per_token)
    return launching.unsupported(Target.of(device), dtype) or shape


class Decoder:
    """Takes one token at a time through a model."""

    def __init__(
        self, model: Mixtral, cache: DecoderCache | None, graphs: Graphs, capture: bool = True
    ) -> None:
        """`cache` provides the experts, unless all are resident. Without `capture`, every step launches its
        kernels one by one."""
        config, device = model.config, model.device
        self.model, self.cache, self.graphs, self.capturing = model, cache, graphs, capture
        model.prepare_step()
        self.routers = [block.block_sparse_moe.gate for block in model.blocks]
        self.inputs = graphs.shared(2, dtype=torch.int64)  # the token's id and position
        self.inputs_there = torch.zeros(2, dtype=torch.int64, device=device)
        most = 2 * config.experts_per_token + MAX_LOOKAHEAD * config.experts
        most = -(-most // 4) * 4  # every row begins at a multiple of 16 bytes, so one kernel writes them all
        self.choices = graphs.shared(config.layers, most, dtype=torch.int32)  # each layer's `Choice.packed`
        self.numbers = self.choices.numpy()  # the same memory
        self.weights = [row[: config.experts_per_token].view(torch.float32) for row in self.choices]
        self.hidden = torch.zeros(1, config.hidden, dtype=model.dtype, device=device)  # if it does not embed
        self.result = torch.zeros_like(self.hidden)
        if model.heads:
            self.result = torch.zeros(config.vocab, dtype=torch.float32, device=device)
        self.captured: weakref.WeakKeyDictionary[KVCache, list[Work]] = weakref.WeakKeyDictionary()
        # What graphs read of the routers, which make new gates when they look ahead anew.
        self.gates: weakref.WeakKeyDictionary[KVCache, list[Tensor | None]] = weakref.WeakKeyDictionary()

    def step(self, given: int | Tensor, kv: KVCache) -> Tensor:
        """Add a token to `kv`; return the logits after it, [V] float32. The next step overwrites them.

        A part without embeddings is given the token's hidden state [1, D] instead of its id, on any device.
        One without a head returns that, [1, D] in the model's dtype, instead of logits.

        Raises `TransferError` if an expert does not arrive, and `ValueError` if `kv` is full.
        """
        position, end = self.model.room(1, 1, kv)
        self.graphs.wait()  # the previous step may not have read its inputs yet
        if isinstance(given, Tensor):
            assert not self.model.embeds, given.shape
            self.hidden.copy_(given)
        else:
            assert self.model.embeds, given
            self.inputs[0] = given
        self.inputs[1] = position
        captured = self.captured.get(kv)
        self.launch(captured or self.parts(kv))
        kv.length = end
        if captured is None and self.capturing:
            self.capture(kv)
        return self.result

    def launch(self, parts: Iterable[Work]) -> None:
        """Launch the parts of a step, and between them let the cache provide each layer's experts."""
        rest = iter(parts)
        next(rest)()
        if self.cache is None:
            return
        for layer in range(len(self.routers)):
            self.graphs.wait()
            for launched in self.cache.provide(layer, *self.choice(layer)):
                next(rest)()
                launched()

    def choice(self, layer: int) -> tuple[list[int], Tensor, list[list[int]]]:
        """A layer's choice as the device wrote it: ids, weights, and a ranking for each later layer."""
        A, E = self.model.config.experts_per_token, self.model.config.experts
        row = self.numbers[layer, : 2 * A + self.routers[layer].distance * E].tolist()
        ahead = [row[i : i + E] for i in range(2 * A, len(row), E)]
        return row[A : 2 * A], self.weights[layer], ahead

    def parts(self, kv: KVCache) -> list[Work]:
        """The parts of one step. Each is to be called once, in order."""
        a_layer = 0 if self.cache is None else 2 if self.cache.divided else 1
        count = 1 + a_layer * len(self.routers)
        return [
            partial(next, self.launches(kv))
        ] * count  # one generator: each call takes it to its next yield

    def launches(self, kv: KVCache) -> Iterator[None]:
        """Launch a step's kernels. Stops wherever a part ends."""
        kernels.fetch(self.inputs, self.inputs_there)
        given, position = self.inputs_there[:1], self.inputs_there[1:]
        if not self.model.embeds:
            given = self.hidden
        choices = iter(self.choices)
        for result in self.model.step(given, position, kv):
            if isinstance(result, Tensor):
                self.result.copy_(result.view_as(self.result))
                yield
            elif result is None:
                yield
            elif self.cache is not None:
                assert result.packed is not None and result.x is not None
                kernels.fetch(result.packed, next(choices)[: len(result.packed)])
                if self.cache.divided:
                    self.cache.give(result.x)
                yield

    def capture(self, kv: KVCache) -> None:
        """Capture the parts of a step with this KV cache. Call it after a first step, which has compiled and
        allocated all that steps share. Warns if the device cannot, and then never tries again."""
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # a collection might free or unlock memory during the capture
        try:
            self.gates[kv] = [router.gates for router in self.routers]
            self.captured[kv] = [self.graphs.capture(part) for part in self.parts(kv)]
        except Exception as error:  # PyTorch's, CUDA's or Triton's
            self.capturing = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"CUDA graphs cannot be made ({reason}): every step launches its kernels one by one, which "
                "is slower; use --no-graphs to do so without this warning",
                RuntimeWarning,
                stacklevel=3,
            )
        finally:
            if collecting:
                gc.enable()
