"""Prompts and decoding as an engine does them, without the tokenizer and the sampler: ids are random."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime.errors import OptionError
from runtime.gpu.decoder import Decoder, make_decoder
from runtime.planning.memory import reserve
from runtime.stats import Stats
from tools.bench.figures import Turn
from tools.bench.subject import Subject, make_cache, make_subject, no_experts
from tools.bench.ways import FORGETFUL, Way, make_ways


@dataclass
class Player:
    """Runs a model in one way: with its decoder where there is one, otherwise by calling the model."""

    model: Mixtral
    kv: KVCache
    chunk: int  # tokens of a prompt in one forward
    decoder: Decoder | None

    def prompt(self, ids: Tensor) -> int:  # [1, T]
        """Add ids to the KV cache. Returns the likeliest next id, for which it waits for the device."""
        with torch.inference_mode():
            for part in ids.split(self.chunk, dim=1):
                logits = self.model(part, self.kv, last=True)  # [1, 1, V]
            return int(logits[0, 0].float().argmax())

    def decode(self, ids: Sequence[int]) -> None:
        """Add one id after the other, each after the answer to the last."""
        device = self.model.device
        for i in ids:
            if self.decoder is None:
                self.prompt(torch.tensor([[i]], device=device))
            else:
                with torch.inference_mode():
                    int(self.decoder.step(i, self.kv).argmax())


class Stage:
    """A subject that runs in several ways, one at a time."""

    def __init__(self, subject: Subject, names: Sequence[str]) -> None:
        """`names` are of `ways.py`, all over one cache. Where the subject's experts are resident, "resident"
        is the only way instead."""
        self.subject, plan = subject, subject.plan
        self.cache = make_cache(subject) if subject.store is not None else None
        self.ways: dict[str, Way | None] = {"resident": None}
        if self.cache is not None:
            if self.cache.divided and (copying := sorted(set(names) & set(FORGETFUL))):
                raise OptionError(f"{copying[0]!r} copies all experts; leave it out, or leave out --misses")
            self.ways = {**make_ways(self.cache, names)}
        self.kv = KVCache.allocate(subject.config, 1, plan.context, plan.dtype, plan.device, plan.kv)
        reserve(plan.device, plan.workspace_bytes)  # as an engine does
        self.players: dict[str, Player] = {}

    def use(self, name: str) -> Player:
        """Run in that way from now on, beginning with an empty KV cache and empty slots."""
        way, subject, options = self.ways[name], self.subject, self.subject.options
        if self.cache is not None and way is not None:
            self.cache.residency.forget()
            subject.model.look_ahead(options.lookahead if way.guesses and options.prefetch else 0)
            subject.provide(way.experts)
        self.kv.truncate(0)
        if name not in self.players:
            decoder = make_decoder(subject.model, way.cache if way else None, options.graphs)
            self.players[name] = Player(subject.model, self.kv, subject.plan.chunk, decoder)
        return self.players[name]

    def play(self, way: str, *works: Callable[[Player], object]) -> list[Turn]:
        """Do one work after the other in that way. Returns a turn for each."""
        player, turns = self.use(way), []
        for work in works:
            counted, start = self.count(), time.perf_counter()
            work(player)
            turns.append(Turn(time.perf_counter() - start, self.count() - counted))
        return turns

    def graphs(self) -> bool:
        """Whether CUDA graphs were made for every way used so far. Making them may have failed."""
        decoders = [player.decoder for player in self.players.values()]
        return all(decoder is not None and len(decoder.captured) > 0 for decoder in decoders)

    def count(self) -> Stats:
        return self.cache.count() if self.cache is not None else Stats()

    def close(self) -> None:
        """Free the memory of the subject and of all that was made over it."""
        self.players.clear()
        self.ways.clear()
        if self.cache is not None:
            self.subject.provide(no_experts)  # those of the ways refer to slots
            self.cache.close()
        self.subject.close()


@contextmanager
def staged(
    args: argparse.Namespace, tokens: int, names: Sequence[str] = ("full", "computing"), **defaults: Any
) -> Iterator[Stage]:
    """A stage for the model that the command line describes: `make_subject`."""
    stage = Stage(make_subject(args, tokens, **defaults), names)
    try:
        yield stage
    finally:
        stage.close()


def random_ids(config: ModelConfig, count: int) -> Tensor:  # [1, count] int64
    return torch.randint(config.vocab, (1, count), generator=torch.Generator().manual_seed(0))
