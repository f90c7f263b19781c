"""The ways of providing experts, and routing by a trace: by calling the model, and by a decoder whose kernels
and graphs are stand-ins. All that really copies gives the same logits as a resident model."""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.quant.backends.blocks import Blocks
from model.shapes import SHAPES
from runtime.experts.trace import Event, Routing
from runtime.gpu.decoder import Decoder
from tests.runtime.gpu.plain_step import Recorded, use_plain_kernels
from tools.bench import link, routing, subject
from tools.bench.decode import make_trace, random_ids, set_up
from tools.bench.play import Stage, difference
from tools.bench.subject import Subject, make_cache, make_subject
from tools.bench.ways import LADDER, make_ways

SMALL = ModelConfig(
    vocab=100, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=64, experts=6,
    experts_per_token=2, context=64, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
TOKENS, START = 8, 3
IDS: list[int] = random_ids(SMALL, TOKENS)[0].tolist()


@pytest.fixture(autouse=True, params=["called", "captured"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether models have a decoder."""
    monkeypatch.setitem(SHAPES, "quarter", SMALL)
    for name in ("BUFFER", "MEMORY"):
        monkeypatch.setattr(link, name, 1 << 16)
    captured: bool = request.param == "captured"
    if captured:
        use_plain_kernels(monkeypatch)
        monkeypatch.setattr("gc.collect", lambda: 0)  # before each capture, and slow
        monkeypatch.setattr("runtime.gpu.decoder.CudaGraphs", lambda device: Recorded())
        monkeypatch.setattr("model.quant.product.Int4Pack", Blocks)
    yield captured


def make(**options: Any) -> Subject:
    args = {"shape": "quarter", "layers": None, "attention": "4", "experts": "4", "enforce": False}
    engine = {"device": "cpu", "dtype": "float32", "context": TOKENS}
    return make_subject(argparse.Namespace(**args | engine | options), TOKENS)


def stage_of(subject: Subject, routing: str, ways: tuple[str, ...] = LADDER) -> Stage:
    return set_up(subject, ways, routing, TOKENS)


@torch.inference_mode()
def logits(stage: Stage, way: str) -> Tensor:
    """Behind each id, after a prompt of some: [T, V]."""
    player, rows = stage.use(way), []
    if player.decoder is not None and not player.decoder.captured:
        player.token(0)  # the stand-in for capturing computes, with whatever is in the slots by then
        stage.use(way)
    player.prompt(torch.tensor([IDS[:START]]))
    for i in IDS[START:]:
        if player.decoder is not None:
            rows.append(player.decoder.step(i, player.kv).clone())
        else:
            assert player.position is not None
            player.position.fill_(player.kv.length)
            rows.append(stage.subject.model(torch.tensor([[i]]), player.kv)[0, 0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("routed", "options"),
    [("own", {}), ("synthetic", {"lookahead": 2, "prefetch": 2}), ("synthetic", {"prefetch": 0})],
)
def test_every_way_gives_the_resident_models_logits(
    routed: str, options: dict[str, int], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "HOST_BYTES", 1 << 16)  # of 18 experts
    resident = make(offload="never")
    expected = logits(stage := stage_of(resident, routed), "resident")
    stage.close()
    offloaded = make(slots=3, **options)
    assert offloaded.store is not None and offloaded.store.count == 8
    stage = stage_of(offloaded, routed, ("full", "computing", *LADDER[1:]))
    for way in (*LADDER, "full"):
        assert torch.equal(logits(stage, way), expected), way
    assert logits(stage, "computing").isfinite().all()
    assert all((player.decoder is not None) == graphs for player in stage.players.values())
    stage.close()
    offloaded.close()


class Notes:
    """Keeps every choice that a trace would."""

    def __init__(self, chosen: list[tuple[int, ...]]) -> None:
        self.chosen = chosen

    def add(self, event: Event) -> None:
        if isinstance(event, Routing):
            self.chosen.append(event.experts)


@pytest.mark.parametrize(("routed", "slots"), [("uniform", 2), ("synthetic", 4)])
def test_forced_routing_is_the_trace_and_hits_are_those_of_its_replay(routed: str, slots: int) -> None:
    made = make(slots=slots)
    stage, chosen = stage_of(made, routed, ("full", "no prefetch", "no cache", "computing")), []
    assert stage.cache is not None
    stage.cache.record(Notes(chosen))
    trace = routing.MAKERS[routed](3, 6, 2, TOKENS)
    for way, hits in (("full", True), ("no prefetch", True), ("no cache", False)):
        player, before = stage.use(way), stage.count()
        chosen.clear()
        player.decode(IDS)
        assert torch.equal(torch.tensor(chosen).view(TOKENS, 3, 2), trace.sort(-1).values), way
        counted = difference(stage.count(), before)
        assert counted.hits + counted.misses == TOKENS * 3 * 2
        expected = routing.hit_ratio(trace, slots) if hits else 0
        assert counted.hits / (TOKENS * 3 * 2) == pytest.approx(expected)
        if way == "full":
            assert 0 < counted.recalled <= counted.recallable == TOKENS * 2 * 2
            assert counted.guesses > 0
        else:
            assert counted.guesses == counted.recallable == 0
    stage.close()


def test_what_crosses_the_link() -> None:
    made = make(slots=3)
    blob = made.setup.plan.blob_bytes
    stage = stage_of(made, "synthetic", ("computing", *LADDER))
    for way in ("no cache", "whole layers", "computing", "full"):
        player = stage.use(way)
        player.decode(IDS[:2])
        before = stage.count()
        player.decode(IDS[2:])
        counted, tokens = difference(stage.count(), before), TOKENS - 2
        needed = {"no cache": 3 * 2, "whole layers": 3 * 6, "computing": 0}.get(way)
        if needed is not None:
            assert counted.copied_bytes == tokens * needed * blob, way
        else:
            assert counted.copied_bytes >= counted.misses * blob - counted.used_guesses * blob
    stage.close()


def test_caches_of_other_sizes_over_the_same_store() -> None:
    made = make(slots=2)
    seen = []
    for slots in (4, 2, 6):
        plan = made.plan(slots)
        assert set(plan.slots_per_layer) == {slots} and plan.arena_bytes
        cache = make_cache(made, plan)
        assert cache.pool.shape[0] == 3 * slots + plan.spares and not cache.pool[-1].eq(0).all()
        stage = Stage(made, make_ways(cache, LADDER), cache, make_trace(made, "own", TOKENS))
        seen.append(logits(stage, "full"))
        stage.close()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    made.close()


def test_a_decoder_is_told_by_the_trace_before_its_first_step(graphs: bool) -> None:
    made = make(slots=2)
    stage = stage_of(made, "synthetic", ("full",))
    decoder = stage.use("full").decoder
    assert (decoder is not None) == graphs
    if decoder is not None:
        assert isinstance(decoder, Decoder) and decoder.cache is not None
        assert type(decoder.routers[0]).__name__ == "TraceRouter" and decoder.routers[0].distance == 1
    stage.close()


def test_graphs_that_fail_are_reported(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(expected: bool) -> None:
        subject = make(slots=3, offload="always")
        stage = stage_of(subject, "own")
        try:
            stage.use("full").decode(IDS[:2])
            assert stage.graphs() is expected
        finally:
            stage.close()
            subject.close()

    def capture(self: Recorded, work: object) -> None:
        raise RuntimeError("out of memory")

    made(graphs)
    monkeypatch.setattr(Recorded, "capture", capture)
    with pytest.warns(RuntimeWarning, match="graphs cannot be made") if graphs else nullcontext():
        made(False)
