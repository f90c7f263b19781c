"""Any rank but rank 0: it does what orders say with its own layers, and passes them on."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from model.kv_cache import KVCache
from runtime.errors import RequestError
from runtime.experts.places import Places
from runtime.ranks.held import as_rows
from runtime.ranks.orders import Kind, Order, rows_of
from runtime.ranks.ring import Ring
from runtime.runner import ModelRunner


class Follower:
    """A rank's part of a model, and the KV caches of its layers by the names that rank 0 gave them."""

    def __init__(self, runner: ModelRunner, ring: Ring, rank: int, texts: int) -> None:
        self.runner, self.ring, self.rank, self.texts = runner, ring, rank, texts
        self.kvs: dict[int, KVCache] = {}
        self.ended = False  # rank 0 has said that there is nothing more to do

    def follow(self) -> None:
        """Do what rank 0 asks for until it ends. Raises `Lost` if a rank is gone."""
        while not self.ended:
            header, rows = self.ring.receive()
            order = Order.unpacked(header)
            if order.kind not in (Kind.FAILED, Kind.END):
                order, rows = self.obey(order, rows)
            order = order.counting(self.runner.count_experts())
            self.ring.send(order.packed(Order.length(self.texts)), rows)
            self.ended = order.kind is Kind.END

    def obey(self, order: Order, rows: Tensor | None) -> tuple[Order, Tensor | None]:
        """The order as it goes on, with the rows that come of it, or with the line that says why it failed.
        The text that it is about is then cut back by the next order for it."""
        try:
            with self.runner.working():
                return order, self.runner.alone(partial(self.compute, order, rows))
        except RequestError as error:
            return replace(order, kind=Kind.FAILED), rows_of(f"rank {self.rank}: {error}")

    def compute(self, order: Order, rows: Tensor | None) -> Tensor | None:
        if order.kind is Kind.FORGET:
            for name, _ in order.texts:
                if (kv := self.kvs.pop(name, None)) is not None:
                    self.runner.give_kv(kv)
            return None
        if order.kind is Kind.COPY:
            (source, length), (target, _) = order.texts
            self.text(target, 0).copy_from(self.text(source), length)
            return None
        if order.kind is Kind.LOOK:
            config = self.runner.config
            own = Places.of(self.runner.cache, config.layers, config.experts).packed()
            return own if rows is None else torch.cat([rows, own])
        if order.kind in (Kind.FETCH, Kind.STORE):
            (name, length), (rank, index) = order.texts
            return rows if rank != self.rank else self.held(name, length, index, rows)
        assert rows is not None
        model, decoder, kvs = (
            self.runner.model,
            self.runner.decoder,
            [self.text(*text) for text in order.texts],
        )
        with torch.inference_mode():
            if order.kind is Kind.STEP and decoder is not None:
                return decoder.step(int(rows) if model.embeds else rows, kvs[0]).clone()
            if model.embeds:
                x = model.embed(rows[:, 0].to(model.device))
            else:
                x = rows.to(model.device, model.dtype)
            return model.through_each(x, kvs) if order.kind is Kind.EACH else model.through(x[None], *kvs)[0]

    def held(self, name: int, length: int, index: int, rows: Tensor | None) -> Tensor | None:
        """Give one of a text's tensors, or store `rows` in it. Rank 0 alone knows when all are there. Until
        then it says in each order that it has none of the text."""
        kv = self.text(name, 0 if rows is not None else length)
        part = list(kv.parts(length).values())[index]
        if rows is None:
            return as_rows(part)
        part.copy_(rows.view(part.dtype).view(part.shape))
        kv.length = length
        return None

    def text(self, name: int, length: int | None = None) -> KVCache:
        """The text of this name, cut back to `length` tokens."""
        if (kv := self.kvs.get(name)) is None:
            kv = self.kvs[name] = self.runner.take_kv()
        if length is not None:
            if kv.length < length:  # an order before this one failed
                raise RequestError(f"{kv.length} tokens of a text of {length} are there; ask again")
            kv.truncate(length)
        return kv
