"""The network over several ranks, as rank 0 sees it: it sends ids around the ring, and gets hidden states.

Rank 0 has the last layers, the head and the sampler. A pass that begins sets the ranks before it to work one
after the other, and rank 0 does its own part when the pass is finished. With several passes under way, all
ranks work at the same time.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime.errors import RequestError
from runtime.gpu.decoder import Decoder
from runtime.process.shelter import Shelter
from runtime.ranks.orders import Kind, Order, line_of
from runtime.ranks.ring import FRAMES, Ring
from runtime.stats import Stats

FORGOTTEN = "an interrupted request lost what the other ranks had computed; ask again"


class RemotePass:
    """A pass that other ranks are computing. Whoever drops it has given it up."""

    def __init__(
        self, pipeline: "Pipeline", number: int, kvs: Sequence[KVCache], pasts: Sequence[int]
    ) -> None:
        self.pipeline, self.number, self.kvs, self.pasts = pipeline, number, kvs, pasts
        self.last = True
        self.arrived: tuple[Order, Tensor | None] | None = None

    def __call__(self) -> Tensor:
        return self.pipeline.finish(self)


class Pipeline:
    """Rank 0's `Passes`."""

    def __init__(self, model: Mixtral, decoder: Decoder | None, ring: Ring, size: int, texts: int) -> None:
        """`model` is rank 0's part. `size` ranks are in the ring, and an order names up to `texts` texts."""
        self.model, self.decoder, self.ring = model, decoder, ring
        self.shelter = Shelter()  # for all that sends and receives
        self.depth = size
        self.texts = texts
        self.numbers, self.names = count(), count()
        self.named: weakref.WeakKeyDictionary[KVCache, int] = weakref.WeakKeyDictionary()
        # Names of texts that are gone here, but not on the other ranks. Finalizers add to it at any moment.
        self.forgotten: deque[int] = deque()
        self.begun: weakref.WeakValueDictionary[int, RemotePass] = weakref.WeakValueDictionary()
        self.under_way = 0  # orders that have not come back
        self.counted = Stats()  # by the other ranks' expert caches
        self.seen: Tensor | None = None  # where the other ranks' experts were (`Places.packed`)
        self.watched = False  # somebody has looked at `seen` since it was last asked for

    def begin(self, ids: Sequence[int], kv: KVCache, past: int, last: bool = True) -> RemotePass:
        begun = self.send(Kind.STEP if last and len(ids) == 1 else Kind.ROWS, ids, [kv], [past])
        begun.last = last
        return begun

    def begin_each(self, ids: Sequence[int], kvs: Sequence[KVCache]) -> RemotePass:
        return self.send(Kind.EACH if len(ids) > 1 else Kind.STEP, ids, kvs, [kv.length for kv in kvs])

    def copy(self, source: KVCache, target: KVCache, length: int) -> None:
        """Have all ranks' parts of a text hold the beginning of another."""
        target.copy_from(source, length)
        self.send(Kind.COPY, None, [source, target], [length, length])

    def send_held(
        self, kind: Kind, kv: KVCache, length: int, rank: int, index: int, rows: Tensor | None
    ) -> RemotePass:
        """Have a rank give or take one of a text's tensors, of its first `length` tokens: `index` counts that
        rank's `KVCache.parts`. Call `arrival` for the answer."""
        return self.start(kind, [kv], [length], [(self.name(kv), length), (rank, index)], rows)

    def send(
        self, kind: Kind, ids: Sequence[int] | None, kvs: Sequence[KVCache], pasts: Sequence[int]
    ) -> RemotePass:
        """Send an order for texts of such lengths on its way."""
        rows = None if ids is None else torch.tensor(ids, dtype=torch.int64, device="cpu")[:, None]
        return self.start(kind, kvs, pasts, list(zip(map(self.name, kvs), pasts, strict=True)), rows)

    def start(
        self,
        kind: Kind,
        kvs: Sequence[KVCache],
        pasts: Sequence[int],
        pairs: Sequence[tuple[int, int]],
        rows: Tensor | None,
    ) -> RemotePass:
        """Send an order on its way. Its result is kept as long as the caller keeps what this returns."""

        def work() -> RemotePass:
            self.forget()
            begun = RemotePass(self, next(self.numbers), kvs, pasts)
            self.begun[begun.number] = begun
            self.dispatch(Order(kind, begun.number, tuple(pairs)), rows)
            if self.watched:
                self.watched = False
                self.dispatch(Order(Kind.LOOK, next(self.numbers)), None)
            return begun

        return self.shelter.do(work)

    def forget(self) -> None:
        """Have the other ranks forget texts that are gone here."""
        while self.forgotten:
            names = [self.forgotten.popleft() for _ in range(min(len(self.forgotten), self.texts))]
            self.dispatch(Order(Kind.FORGET, next(self.numbers), tuple((name, 0) for name in names)), None)

    def look(self) -> Tensor | None:
        """What is known of the other ranks' experts. The next order that is sent is followed by one that asks
        for more. Any thread may call."""
        self.watched = True
        return self.seen

    def dispatch(self, order: Order, rows: Tensor | None) -> None:
        while self.under_way >= FRAMES:
            self.take()
        self.ring.send(order.packed(Order.length(self.texts)), rows)
        self.under_way += 1

    def name(self, kv: KVCache) -> int:
        """What the other ranks call a text."""
        if (name := self.named.get(kv)) is None:
            name = self.named[kv] = next(self.names)
            weakref.finalize(kv, self.forgotten.append, name).atexit = False
        return name

    def take(self) -> None:
        """Take the order that comes back next, and give it to the pass that waits for it, if any does."""
        header, rows = self.ring.receive()
        self.under_way -= 1
        order = Order.unpacked(header)
        self.counted = order.counted
        if order.kind is Kind.LOOK:
            self.seen = rows
        if (waiting := self.begun.get(order.number)) is not None:
            waiting.arrived = order, rows
        for number, earlier in list(self.begun.items()):  # orders come back in the order of their numbers
            if number < order.number and earlier.arrived is None:
                earlier.arrived = Order(Kind.FAILED, number), None

    def arrival(self, begun: RemotePass) -> tuple[Order, Tensor | None]:
        """Wait until an order has come back. May be called again after an interrupt, which loses nothing.
        Raises `RequestError` if a rank failed, and `Lost` if one is gone."""
        order, rows = self.shelter.do(lambda: self.await_arrival(begun))
        if order.kind is Kind.FAILED:
            raise RequestError(FORGOTTEN if rows is None else line_of(rows))
        return order, rows

    def await_arrival(self, begun: RemotePass) -> tuple[Order, Tensor | None]:
        while begun.arrived is None:
            self.take()
        return begun.arrived

    def finish(self, begun: RemotePass) -> Tensor:
        """Wait for the other ranks as `arrival` does, and compute rank 0's layers and the logits."""
        order, rows = self.arrival(begun)
        assert rows is not None
        kvs = begun.kvs
        for kv, past in zip(kvs, begun.pasts, strict=True):
            if kv.length < past:
                raise RequestError(FORGOTTEN)  # a pass before this one failed
            kv.truncate(past)
        model = self.model
        x = rows.to(model.device, model.dtype)
        if rows.is_cuda:  # another thread has received it, on a stream of its own
            rows.record_stream(torch.cuda.current_stream(rows.device))
        if order.kind is Kind.EACH:
            return model.logits_each(model.through_each(x, kvs))
        if self.decoder is not None and order.kind is Kind.STEP:
            return self.decoder.step(x, kvs[0]).clone()[None]
        return model.logits(model.through(x[None], kvs[0]), begun.last)[0]

    def close(self) -> None:
        """Tell the other ranks that there is nothing more to do. Raises `Lost` if one is gone."""
        try:
            self.shelter.do(self.end)
        finally:
            self.shelter.close()

    def end(self) -> None:
        self.dispatch(Order(Kind.END, next(self.numbers)), None)
        while self.under_way:
            self.take()
