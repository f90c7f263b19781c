"""Prompts and decoding as an engine does them, less the tokenizer and the sampler: ids are random."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime.experts.cache import ExpertCache
from runtime.gpu.decoder import Decoder, make_decoder
from runtime.planning.footprint import PREFILL_CHUNK
from runtime.planning.memory import reserve
from runtime.stats import Stats
from tools.bench.forced import Trace, TraceRouter
from tools.bench.subject import Subject, look_ahead, nobody
from tools.bench.ways import Way


@dataclass
class Player:
    """One way to run a model: with its decoder where there is one, else by calling the model."""

    model: Mixtral
    kv: KVCache
    chunk: int = PREFILL_CHUNK
    decoder: Decoder | None = None
    position: Tensor | None = None  # [1] int64, for whoever has to know it on the device

    def prompt(self, ids: Tensor) -> int:  # [1, T]
        """Add ids to the KV cache; the likeliest next one: who has it has waited for the device."""
        with torch.inference_mode():
            for part in ids.split(self.chunk, dim=1):
                logits = self.model(part, self.kv, last=True)  # [1, 1, V]
            return int(logits[0, 0].float().argmax())

    def token(self, i: int) -> int:
        """The same for one id behind others."""
        if self.position is not None:
            self.position.fill_(self.kv.length)
        if self.decoder is not None:
            with torch.inference_mode():
                return int(self.decoder.step(i, self.kv).argmax())
        return self.prompt(torch.tensor([[i]], device=self.model.embed_tokens.weight.device))

    def decode(self, ids: Sequence[int]) -> None:
        """One id after the other, each after the answer to the last."""
        for i in ids:
            self.token(i)


class Stage:
    """A subject that can be played in several ways, one at a time, with routing of its own or forced."""

    def __init__(
        self, subject: Subject, ways: dict[str, Way], cache: ExpertCache | None, trace: Trace | None
    ) -> None:
        """`cache` is what the ways are made of; without one the subject's experts are resident, and the only
        way is called "resident". A trace routes all decoded tokens."""
        self.subject, self.ways, self.cache, self.trace = subject, ways, cache, trace
        setup, config = subject.setup, subject.config
        self.kv = KVCache.allocate(config, 1, setup.plan.context, setup.dtype, setup.device)
        reserve(setup.device, setup.plan.workspace_bytes)  # as an engine does
        self.position = torch.zeros(1, dtype=torch.int64, device=setup.device)
        self.gates = [block.block_sparse_moe.gate for block in subject.blocks]
        if trace is not None:
            for layer, (block, gate) in enumerate(zip(subject.blocks, self.gates, strict=True)):
                router = TraceRouter(gate, trace, layer, self.position)
                block.block_sparse_moe.gate = router  # type: ignore[assignment]
        self.players: dict[str, Player] = {}

    def use(self, name: str) -> Player:
        """Play that way from now on, with an empty KV cache and empty slots."""
        if self.cache is not None:
            self.cache.forget()
            way = self.ways[name]
            look_ahead(self.subject, way.guesses)
            self.subject.provide(way.experts)
        self.kv.truncate(0)
        if name not in self.players:
            self.players[name] = self.make_player(self.ways.get(name))
        return self.players[name]

    def make_player(self, way: Way | None) -> Player:
        subject = self.subject
        decoder = make_decoder(subject.model, way.cache if way else None, subject.options.graphs)
        return Player(subject.model, self.kv, subject.setup.plan.chunk, decoder, self.position)

    def graphs(self) -> bool:
        """Whether each way that has been played is put on the device as graphs: they might have failed."""
        decoders = [player.decoder for player in self.players.values()]
        return all(decoder is not None and len(decoder.captured) > 0 for decoder in decoders)

    def count(self) -> Stats:
        return self.cache.count() if self.cache is not None else Stats()

    def close(self) -> None:
        """The subject's routers are its own again. The cache is closed."""
        for block, gate in zip(self.subject.blocks, self.gates, strict=True):
            block.block_sparse_moe.gate = gate
        self.players.clear()
        self.ways.clear()
        if self.cache is not None:
            self.subject.provide(nobody)  # who did so may hold on to slots
            self.cache.close()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
