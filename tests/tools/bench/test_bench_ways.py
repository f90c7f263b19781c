"""The ways of providing experts by calling the model and by a decoder whose kernels and graphs are stand-ins.
All that really copy give the same logits as a resident model."""

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
from tests.runtime.gpu.plain_step import Recorded, use_plain_kernels
from tools.bench import subject
from tools.bench.stage import Stage, random_ids
from tools.bench.subject import Subject, make_subject
from tools.bench.ways import LADDER

SMALL = ModelConfig(
    vocab=128, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=64, experts=6,
    experts_per_token=2, context=64, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
TOKENS, START = 8, 3
IDS: list[int] = random_ids(SMALL, TOKENS)[0].tolist()


@pytest.fixture(autouse=True, params=["called", "captured"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether models have a decoder."""
    monkeypatch.setitem(SHAPES, "quarter", SMALL)
    captured: bool = request.param == "captured"
    if captured:
        use_plain_kernels(monkeypatch)
        monkeypatch.setattr("gc.collect", lambda: 0)  # before each capture, and slow
        monkeypatch.setattr("runtime.gpu.decoder.CudaGraphs", lambda device: Recorded())
        monkeypatch.setattr("model.quant.backends.BACKENDS", (Blocks,))
    yield captured


def make(**options: Any) -> Subject:
    formats = {"attention": "4", "experts": "4", "head": "8"}
    args = {"shape": "quarter", "layers": None, **formats, "enforce": False}
    engine = {"device": "cpu", "dtype": "float32", "context": TOKENS}
    return make_subject(argparse.Namespace(**args | engine | options), TOKENS)


@torch.inference_mode()
def logits(stage: Stage, way: str) -> Tensor:
    """After each id, after a prompt of some: [T, V]."""
    player, rows = stage.use(way), []
    if player.decoder is not None and not player.decoder.captured:
        player.decode([0])  # the stand-in for capturing computes, with whatever is in the slots by then
        stage.use(way)
    player.prompt(torch.tensor([IDS[:START]]))
    for i in IDS[START:]:
        if player.decoder is not None:
            rows.append(player.decoder.step(i, player.kv).clone())
        else:
            rows.append(stage.subject.model(torch.tensor([[i]]), player.kv)[0, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"lookahead": 2, "prefetch": 2}, {"prefetch": 0}])
def test_every_way_gives_the_resident_models_logits(
    options: dict[str, int], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "HOST_BYTES", 1 << 16)  # of 18 experts
    resident = make(offload="never")
    stage = Stage(resident, ("full",))
    expected = logits(stage, "resident")
    stage.close()
    offloaded = make(slots=3, **options)
    assert offloaded.store is not None and offloaded.store.count == 8
    stage = Stage(offloaded, ("full", "computing", *LADDER[1:]))
    for way in (*LADDER, "full"):
        assert torch.equal(logits(stage, way), expected), way
    assert logits(stage, "computing").isfinite().all()
    assert all((player.decoder is not None) == graphs for player in stage.players.values())
    stage.close()


def test_guesses_are_made_in_the_full_way_alone() -> None:
    made = make(slots=3)
    stage = Stage(made, ("computing", *LADDER))
    for way in ("full", *LADDER[1:], "computing", "full"):
        player, before = stage.use(way), stage.count()
        player.decode(IDS)
        counted = stage.count() - before
        needed = counted.hits + counted.misses
        assert needed == (0 if way in ("whole layers", "computing") else TOKENS * 3 * 2), way
        assert (counted.guesses > 0) == (way == "full") == (counted.recallable > 0), way
        if way == "no cache":
            assert counted.hits == 0
    stage.close()


def test_what_crosses_the_link() -> None:
    made = make(slots=3)
    stage = Stage(made, ("computing", *LADDER))
    assert stage.cache is not None
    size = stage.cache.store.size  # an expert, without what rounds its memory up
    for way in ("no cache", "whole layers", "computing", "full"):
        player = stage.use(way)
        player.decode(IDS[:2])
        before = stage.count()
        player.decode(IDS[2:])
        counted, tokens = stage.count() - before, TOKENS - 2
        needed = {"no cache": 3 * 2, "whole layers": 3 * 6, "computing": 0}.get(way)
        if needed is not None:
            assert counted.copied_bytes == tokens * needed * size, way
        else:
            assert counted.copied_bytes >= counted.misses * size - counted.used_guesses * size
    stage.close()


def test_slots_are_filled_before_they_are_used() -> None:
    made = make(slots=4)
    stage = Stage(made, ("computing",))
    assert stage.cache is not None
    pool = stage.cache.pool
    assert pool.shape[0] == 3 * 4 + made.plan.spares and not any(blob.eq(0).all() for blob in pool)
    stage.close()


def test_graphs_that_fail_are_reported(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(expected: bool) -> None:
        subject = make(slots=3, offload="always")
        stage = Stage(subject, ("full",))
        try:
            stage.use("full").decode(IDS[:2])
            assert stage.graphs() is expected
        finally:
            stage.close()

    def capture(self: Recorded, work: object) -> None:
        raise RuntimeError("out of memory")

    made(graphs)
    monkeypatch.setattr(Recorded, "capture", capture)
    with pytest.warns(RuntimeWarning, match="graphs cannot be made") if graphs else nullcontext():
        made(False)
