"""Passes of tokens through the network, as whoever samples sees them: begun, and finished later.

In one process, a pass is computed when it is finished. Over ranks (`runtime.ranks.pipeline`), beginning a
pass sets the other ranks to work, so several passes under way keep several ranks busy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime.experts.places import Places
from runtime.gpu.decoder import Decoder
from runtime.held import Held
from runtime.planning.rank_plans import RankPlans
from runtime.stats import Stats

Pass = Callable[[], Tensor]  # finishes a pass, and returns its logits


class Passes(Protocol):
    """Begins passes. Finish them in the order in which they began, inside of `ModelRunner.alone`."""

    @property
    def depth(self) -> int:
        """How many passes can usefully be under way at once."""
        ...

    def begin(self, ids: Sequence[int], kv: KVCache, past: int, last: bool = True) -> Pass:
        """Add `ids` to a text of `past` tokens. The pass gives the logits [T, V] after each of them, or with
        `last` [1, V] after the last. `past` is the length that `kv` will have when all passes begun before
        are finished."""
        ...

    def begin_each(self, ids: Sequence[int], kvs: Sequence[KVCache]) -> Pass:
        """Add one token to each of N texts. The pass gives the logits after it, [N, V]."""
        ...

    def copy(self, source: KVCache, target: KVCache, length: int) -> None:
        """Have `target` hold the first `length` tokens of `source`, and nothing else."""
        ...


class Company(Protocol):
    """The other ranks, as an engine needs to know of them."""

    @property
    def rank(self) -> int:
        """This process's own."""
        ...

    @property
    def plans(self) -> RankPlans:
        """Those of all ranks."""
        ...

    def follow(self) -> None:
        """On another rank than 0: do what rank 0 asks for, until it ends. Raises `RequestError` if a rank is
        gone."""
        ...

    def on_loss(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called from another thread, with the reason, once a rank is gone."""
        ...

    def held(self, alone: Callable[..., Any], kv: KVCache, length: int) -> Held:
        """What all ranks hold of a text's first `length` tokens. `alone` is `ModelRunner.alone`. Raises
        `RequestError` if they do not hold it alike."""
        ...

    def look(self) -> Places:
        """Where the other ranks' experts were when rank 0 last heard of it. Newer figures come back with the
        next orders. Any thread may ask."""
        ...

    def count(self) -> Stats:
        """What their experts have counted."""
        ...

    def in_its_thread(self) -> bool:
        """Whether the calling thread is one that a forward may wait for."""
        ...

    def check(self) -> None:
        """Raises `RequestError` if one of them is gone."""
        ...

    def close(self) -> None:
        """Take no further part. Does not raise."""
        ...


class Here:
    """All layers are in this process, so a pass begins when it is to be finished."""

    depth = 1

    def __init__(self, model: Mixtral, decoder: Decoder | None, device: torch.device) -> None:
        self.model, self.decoder, self.device = model, decoder, device

    def begin(self, ids: Sequence[int], kv: KVCache, past: int, last: bool = True) -> Pass:
        return partial(self.compute, ids, kv, past, last)

    def begin_each(self, ids: Sequence[int], kvs: Sequence[KVCache]) -> Pass:
        if len(ids) == 1:
            return self.begin(ids, kvs[0], kvs[0].length)
        return partial(self.compute_each, ids, kvs)

    def compute(self, ids: Sequence[int], kv: KVCache, past: int, last: bool) -> Tensor:
        kv.truncate(past)
        if self.decoder is not None and last and len(ids) == 1:
            return self.decoder.step(ids[0], kv).clone()[None]
        logits: Tensor = self.model(torch.tensor([ids], device=self.device), kv, last=last)  # [1, T, V]
        return logits[0]

    def compute_each(self, ids: Sequence[int], kvs: Sequence[KVCache]) -> Tensor:
        return self.model.decode(torch.tensor(ids, device=self.device), kvs)

    def copy(self, source: KVCache, target: KVCache, length: int) -> None:
        target.copy_from(source, length)
