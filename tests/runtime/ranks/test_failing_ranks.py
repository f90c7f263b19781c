"""What fails on one rank: what the others are told, and what works afterwards. Ranks are threads."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from runtime import DeviceError, Engine, OptionError, RequestError
from runtime.ranks.follower import Follower
from runtime.ranks.meeting import Meeting
from runtime.ranks.orders import Kind, Order
from runtime.ranks.ring import Ring
from runtime.ranks.starting import start_rank
from tests.quantized import quantize_folder
from tests.runtime.ranks.engines import on_ranks, options_for, over_ranks
from tests.runtime.ranks.test_over_ranks import CPU, GREEDY, prompt


@pytest.fixture(scope="module")
def folder(variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = variant(layers=4, ffn=64)
    return quantize_folder(plain, tmp_path_factory.mktemp("failing") / "4", "4")


def test_a_beginning_that_could_not_be_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request that needs it fails, and the same request works afterwards."""
    compute, failing = Follower.compute, False

    def fails(self: Follower, order: Order, rows: Tensor | None) -> Any:
        if failing and order.kind is Kind.COPY:
            raise RequestError("no memory")
        return compute(self, order, rows)

    monkeypatch.setattr(Follower, "compute", fails)

    def measure(engine: Engine) -> None:
        nonlocal failing
        ids, longer = prompt(40), dataclasses.replace(GREEDY, max_new_tokens=30)
        expected: list[Any] = list(engine.generate(ids, GREEDY))
        with engine.batch() as batch:
            batch.add(engine.work(ids, longer))
            batch.step()  # from now on its text is in use, so its beginning has to be copied
            for failing in (True, False):
                request, got = batch.add(engine.work(ids, GREEDY)), list[Any]()
                while not (got and (isinstance(got[-1], RequestError) or got[-1].finish)):
                    got += [result for its, result in batch.step() if its is request]
                if failing:
                    assert "ask again" in str(got[0])
        assert got == expected

    over_ranks(folder, (2, 2), measure, **CPU, parallel=2)


def test_a_mistake_on_a_rank_is_told_to_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Follower, *words: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(Follower, "compute", fails)
    found = list[RequestError]()

    def measure(engine: Engine) -> None:
        with pytest.raises(RequestError) as caught:
            engine.logits(prompt(7))
        found.append(caught.value)

    with pytest.raises(ValueError, match="no such thing"):
        over_ranks(folder, (2, 2), measure, **CPU)
    assert str(found[0]) == "rank 1: ValueError: no such thing"


def test_the_only_rank_has_all_layers(folder: Path) -> None:
    with pytest.raises(OptionError, match="rank_layers is 2,2, and the only rank has all 4 layers"):
        on_ranks(1, lambda meeting: start_rank(folder, options_for((2, 2), **CPU), *[None] * 4, meeting))
    assert over_ranks(folder, (4,), lambda engine: len(engine.model.layers), **CPU) == 4


def test_a_rank_that_is_lost_while_others_get_ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the ring stays behind."""
    share, rings = Meeting.share, list[Ring]()

    def leaves(self: Meeting, topic: str, value: Any) -> list[Any]:
        if topic == "ready" and self.rank == 1:
            raise DeviceError("no more")
        return share(self, topic, value)

    make = Ring.__init__

    def remembered(self: Ring, *words: Any, **more: Any) -> None:
        make(self, *words, **more)
        rings.append(self)

    monkeypatch.setattr(Meeting, "share", leaves)
    monkeypatch.setattr(Ring, "__init__", remembered)
    with pytest.raises(DeviceError, match="no more"):
        over_ranks(folder, (2, 2), lambda engine: None, **CPU)
    assert len(rings) == 2 and all(ring.closed for ring in rings)
