"""Checkpoints of every width. Each is loaded twice: resident, and with its experts in an arena. A test puts
any cache in front of that arena, so a case costs no loading."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.mixtral import Block
from model.quant.expert import ExpertFormat
from model.target import Target
from runtime import Engine, EngineOptions, SamplingParams
from runtime.experts.arena import Arena
from runtime.experts.berths import Berths
from runtime.experts.cache import ExpertCache
from runtime.experts.copying import CopyEngine
from runtime.experts.exchange import Exchange
from runtime.experts.files import DiskLink, ExpertFiles
from runtime.experts.host import HostExperts
from runtime.experts.link import HostLink, Link
from runtime.experts.making import cache_over
from runtime.experts.policy import LRU, make_policy
from runtime.experts.split import Split
from runtime.experts.store import Channels, Store
from runtime.experts.tiers import SPARE_BERTHS, SPARE_SLOTS
from runtime.experts.trace import Event
from tests.quantized import quantize_folder

CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")


class JitterLink(HostLink):
    """Sleeps at random, and copies pieces of random lengths up to `longest` bytes."""

    def __init__(self, seed: int, longest: int) -> None:
        super().__init__()
        self.random, self.longest = random.Random(seed), longest

    @property
    def piece(self) -> int:
        return self.random.randint(self.longest // 5 + 1, self.longest)

    @piece.setter
    def piece(self, value: int) -> None: ...

    def move(self, source: Tensor, target: Tensor, demand: bool) -> None:
        if self.random.random() < 0.1:
            time.sleep(self.random.random() * 1e-3)
        super().move(source, target, demand)


class FaultyLink(HostLink):
    """Fails to move the n-th piece if `fails(n, demand)`. Keeps a list of all pieces."""

    def __init__(self, fails: Callable[[int, bool], bool], piece: int) -> None:
        super().__init__()
        self.fails, self.piece = fails, piece
        self.pieces: list[tuple[int, bool]] = []  # (bytes, demand)

    def move(self, source: Tensor, target: Tensor, demand: bool) -> None:
        self.pieces.append((source.numel(), demand))
        if self.fails(len(self.pieces) - 1, demand):
            target[: source.numel() // 2].fill_(255)  # the bytes that did arrive are wrong
            raise OSError("the bus\nis on strike")
        super().move(source, target, demand)


class Events(list[Event]):
    """A recorder that keeps everything."""

    def add(self, event: Event) -> None:
        self.append(event)

    def of(self, *kinds: type) -> list[Any]:
        return [event for event in self if isinstance(event, kinds)]


class Rig:
    """A resident engine, and one whose cache a test can replace."""

    def __init__(self, folder: Path, dtype: str) -> None:
        def load(**options: Any) -> Engine:
            return Engine.load(folder, EngineOptions(device="cpu", dtype=dtype, **options))

        self.resident, self.engine = load(offload="never"), load(offload="always")
        cache = self.engine.runner.cache
        assert cache is not None
        self.folder, self.cache, self.arena = folder, cache, cache.store.arena
        self.form = self.cache_format(folder, dtype)
        self.layers, self.experts = self.engine.config.layers, self.engine.config.experts
        self.known: dict[Any, Any] = {}

    def cache_format(self, folder: Path, dtype: str) -> ExpertFormat:
        spec = open_checkpoint(folder).formats.experts
        return ExpertFormat.of(self.engine.config, spec, getattr(torch, dtype), Target.of(CPU))

    @contextmanager
    def cached(
        self,
        slots: int | Sequence[int] = 2,
        policy: str = "lru",
        lookahead: int = 1,
        prefetch: int = 1,
        link: Link | None = None,
        berths: int | None = None,
        back: Link | None = None,
        disk: Callable[[ExpertFiles], DiskLink] = DiskLink,
        split: Split | None = None,
    ) -> Iterator[ExpertCache]:
        """Give `engine` a cache of this kind while inside. With `berths`, the others are in files. With
        `split`, the host computes some."""
        counts = [slots] * self.layers if isinstance(slots, int) else slots
        every, spares = self.layers * self.experts, lookahead * prefetch
        up = CopyEngine(link or HostLink())
        if berths is None:
            holding = Berths(every, LRU(), SPARE_BERTHS, every)
            arena = cast(Arena, KeptArena(self.arena))
            store = Store(arena, holding, self.experts, self.form.kept[-1].end, Channels(up))
            store.load(self.layers)
        else:
            store, spares = self.tiered(berths, policy, up, back, disk), spares + SPARE_SLOTS
        cache = cache_over(store, self.form, CPU, counts, spares, policy, prefetch)
        if split is not None:
            config, dtype = self.engine.config, self.engine.runner.dtype
            host = HostExperts(self.form)
            cache.open_exchange(Exchange(host, config.layers, config.hidden, dtype, CPU))
            cache.residency.split = split
        blocks = [cast(Block, block) for block in self.engine.model.layers]
        self.engine.model.look_ahead(lookahead if prefetch else 0)
        for n, block in enumerate(blocks):
            block.block_sparse_moe.experts = cache.layer(n)
        runner = self.engine.runner
        before, runner.cache = runner.plan, cache
        planned = every if berths is None else berths
        runner.plan = replace(before, slots_per_layer=tuple(counts), spares=spares, berths=planned)
        try:
            yield cache
        finally:
            cache.close()
            runner.cache, runner.plan = self.cache, before
            for n, block in enumerate(blocks):
                block.block_sparse_moe.experts = self.cache.layer(n)

    def tiered(
        self, berths: int, policy: str, up: CopyEngine, back: Link | None, disk: Callable[..., DiskLink]
    ) -> Store:
        """A store with some experts in berths, as loading fills it, and all of them in files."""
        files = ExpertFiles.of(open_checkpoint(self.folder), self.form)
        every = self.layers * self.experts
        holding = Berths(berths, make_policy(policy, 0, self.layers), SPARE_BERTHS, every)
        arena = Arena(berths, self.form.blob_bytes, tiered=True)
        channels = Channels(up, CopyEngine(back or HostLink()), CopyEngine(disk(files)))
        store = Store(arena, holding, self.experts, self.form.kept[-1].end, channels, files)
        for (layer, e), memory in store.load(self.layers).items():
            memory.copy_(self.arena.berth(layer * self.experts + e)[: len(memory)])
        return store

    def ids(self, count: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.engine.config.vocab, (count,), generator=generator).tolist()

    def tokens(self, prompt: Sequence[int], count: int, seed: int = 0) -> list[tuple[int, float]]:
        """The resident engine's tokens: (id, logprob)."""
        key = (tuple(prompt), seed)
        if len(self.known.get(key, ())) < count:
            self.known[key] = sampled(self.resident, prompt, count, seed)
        return self.known[key][:count]

    def logits(self, prompt: Sequence[int]) -> Tensor:
        key = tuple(prompt)
        if key not in self.known:
            self.known[key] = self.resident.logits(prompt)
        return self.known[key]

    def close(self) -> None:
        self.engine.close()
        self.resident.close()


class KeptArena:
    """The rig's arena, for a cache that is closed before the rig is."""

    def __init__(self, arena: Arena) -> None:
        self.berth = arena.berth

    def close(self) -> None: ...


def sampled(engine: Engine, prompt: Sequence[int], count: int, seed: int = 0) -> list[tuple[int, float]]:
    params = SamplingParams(max_new_tokens=count, temperature=1, top_p=1, seed=seed, ignore_eos=True)
    return [(token.id, token.logprob) for token in engine.generate(prompt, params)]


@pytest.fixture(scope="session")
def rigs(
    variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Rig]]:
    """Makes the rig of a width of experts, and of a `source`, by default a small random model. Each is made
    only once."""
    plain: list[Path] = []
    folder, folders, made = tmp_path_factory.mktemp("widths"), dict[Any, Path](), dict[Any, Rig]()

    def random_model() -> Path:
        if not plain:
            plain.append(variant(hidden=64, ffn=64, layers=3, experts=8, context=384))
        return plain[0]

    def quantized(source: Path, bits: int) -> Path:
        if bits == 16:
            return source
        key = (source, bits)
        if key not in folders:
            folders[key] = quantize_folder(source, folder / f"{len(folders)}", str(bits))
        return folders[key]

    def make(bits: int = 16, dtype: str = "float32", source: Path | None = None) -> Rig:
        key = (source, bits, dtype)
        if key not in made:
            made[key] = Rig(quantized(source or random_model(), bits), dtype)
        return made[key]

    yield make
    for rig in made.values():
        rig.close()


@pytest.fixture
def rig(rigs: Callable[..., Rig]) -> Rig:
    return rigs()


@pytest.fixture(scope="session")
def jitter() -> type[JitterLink]:
    return JitterLink


@pytest.fixture(scope="session")
def faulty() -> type[FaultyLink]:
    return FaultyLink


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture(scope="session")
def sample() -> Callable[..., list[tuple[int, float]]]:
    """(engine, prompt, count, seed) -> ids and logprobs, at temperature 1."""
    return sampled
