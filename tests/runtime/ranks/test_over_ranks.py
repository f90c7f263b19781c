"""Layers over ranks: what is computed has the bits of one process, whatever the split. Ranks are threads."""

import gc
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import Engine, EngineOptions, RequestError, SamplingParams
from runtime.answer import Token
from runtime.batching.batch import Request, Work
from runtime.engine import DEMO
from runtime.ranks.follower import Follower
from runtime.ranks.meeting import Meeting
from runtime.ranks.pipeline import Pipeline
from runtime.ranks.starting import plan_named_ranks, start_rank
from tests.parts import splits
from tests.quantized import quantizer
from tests.runtime.ranks.engines import on_ranks, options_for, over_ranks
from tools.perplexity import score

GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
CPU = {"device": "cpu", "threads": 1}


def prompt(length: int, seed: int = 0) -> list[int]:
    r = random.Random(seed)
    return [1, *(r.randrange(3, 400) for _ in range(length - 1))]


def ask(engine: Engine) -> list[Any]:
    """Logits after prompts of a part of a chunk and of several, and texts of one request and of more."""
    longest = engine.plan.context - 8
    found: list[Any] = [engine.logits(prompt(length)) for length in (1, 7, longest)]
    found += [list(engine.generate(prompt(length, 1), GREEDY)) for length in (1, 30, longest)]
    with engine.session() as session:  # which goes on with what its KV caches hold, and is cut back
        for length in (40, 50, 20):
            found.append(list(session.complete(prompt(length), GREEDY)))
    return found


def texts_together(engine: Engine, reuse: bool = True) -> list[list[Token | RequestError]]:
    """What a batch writes, one of whose requests leaves early. With `reuse`, beginnings are copied."""
    r, requests, got = random.Random(1), list[Request](), dict[Request, list[Token | RequestError]]()
    with engine.batch() as batch:
        for n in range(9):
            ids = prompt(engine.plan.chunk + 40 if n == 5 else 10 + 5 * n, seed=n // 2)
            params = SamplingParams(max_new_tokens=3 + n % 4, temperature=0.8, seed=n, ignore_eos=True)
            requests.append(batch.add(Work(ids, params, engine.tokenizer.stream(ids), reuse)))
            got[requests[-1]] = []
        gone, steps = requests[3], 0
        while batch.busy:
            for request, result in batch.step():
                got[request].append(result)
            steps += 1
            if steps == 2 + r.randrange(8):
                batch.cancel(gone)
    return [got[request] for request in requests if request is not gone]


def equal(found: list[Any], expected: list[Any]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.fixture(scope="module")
def folder(variant: Callable[..., Path]) -> Path:
    return variant(layers=4, ffn=64)


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return quantizer(folder, tmp_path_factory.mktemp("ranks"))


def by_rank(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of layers in their order, by rank: rank 0 has the last ones."""
    return (layers[-1], *layers[:-1])


def test_all_splits(folder: Path) -> None:
    options: dict[str, Any] = {**CPU, "dtype": "float32"}
    with Engine.load(folder, EngineOptions(**options)) as engine:
        expected = ask(engine)
    assert len({token.id for token in expected[3]}) > 1
    for layers in splits(4, most=4):
        assert equal(over_ranks(folder, by_rank(layers), ask, **options), expected), layers


@pytest.mark.parametrize(
    ("layers", "formats", "options"),
    [
        ((2, 2), None, {"dtype": "bfloat16", "slots": 2}),
        ((1, 1, 2), None, {"dtype": "bfloat16", "kv": 8}),
        ((3, 1), (4, 4, 8), {}),
        ((1, 2, 1), (4, "3g32", 8), {"slots": 3}),
        ((1, 1, 1, 1), (8, "2g32", 16), {"slots": 2, "berths": 3, "lookahead": 2, "prefetch": 2}),
        ((2, 2), (4, 4, 8), {"slots": 2, "map": False, "policy": "lfu"}),
    ],
)
def test_formats_and_tiers(
    folder: Path,
    quantized: Callable[..., Path],
    layers: tuple[int, ...],
    formats: Any,
    options: dict[str, Any],
) -> None:
    reuse = formats is not None  # others compute a beginning in other pieces, which may round differently
    folder = quantized(*formats) if formats else folder
    together = {**CPU, **options, "parallel": 3}
    alone = {name: value for name, value in together.items() if name != "berths"}
    with Engine.load(folder, EngineOptions(**alone)) as engine:
        expected = [ask(engine), texts_together(engine, reuse)]

    def measure(engine: Engine) -> list[Any]:
        return [ask(engine), texts_together(engine, reuse), engine.stats()]

    found = over_ranks(folder, by_rank(layers), measure, **together)
    assert equal(found[0], expected[0]) and found[1] == expected[1]
    if "slots" in options:  # rank 0 hears of all ranks' experts
        assert found[2].misses > 0 and found[2].copied_bytes > 0


def test_the_demo_and_its_perplexity() -> None:
    text = (Path(__file__).parent / "engines.py").read_text()

    def measure(engine: Engine) -> tuple[float, list[list[Token | RequestError]]]:
        return score(engine, text, 256, 100).nats, texts_together(engine, reuse=False)

    options: dict[str, Any] = {**CPU, "parallel": 4}
    with Engine.load(options=EngineOptions(**options)) as engine:
        expected = measure(engine)
    assert over_ranks(DEMO, (3, 3, 2), measure, **options, slots=3) == expected


def test_several_ranks_work_at_the_same_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's chunks and a batch's groups are under way together, as many as there are ranks."""
    most = 0
    send = Pipeline.dispatch

    def counting(self: Pipeline, *words: Any) -> None:
        nonlocal most
        send(self, *words)
        most = max(most, self.under_way)

    monkeypatch.setattr(Pipeline, "dispatch", counting)

    def measure(engine: Engine) -> list[int]:
        nonlocal most
        seen = []
        for work in (lambda: engine.logits(prompt(600)), lambda: texts_together(engine)):
            most = 0
            work()
            seen.append(most)
        return seen

    assert over_ranks(folder, (2, 2), measure, **CPU, parallel=4) == [2, 3]  # with the copy of a beginning


def test_a_beginning_that_is_under_way_is_waited_for(quantized: Callable[..., Path]) -> None:
    """Choices of one request compute their prompt once. Prompts with little in common do not wait."""

    def measure(engine: Engine) -> list[list[int]]:
        found = []
        for alike in (600, 3):
            with engine.batch() as batch:
                requests = []
                for n in range(3):
                    ids = prompt(alike) + prompt(20, seed=n)
                    requests.append(batch.add(Work(ids, GREEDY, engine.tokenizer.stream(ids))))
                while batch.busy:
                    batch.step()
                found.append([request.reused for request in requests])
        return found

    options: dict[str, Any] = {**CPU, "parallel": 3}
    first, second = over_ranks(quantized(4, 4, 8), (2, 2), measure, **options)
    assert first == [0, 601, 601] and second[0] <= 3 and second[1] <= 3


@pytest.mark.parametrize("rank", [1, 2])
def test_a_request_that_fails_on_a_rank(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """It fails with that rank's line, and the next one is right, whatever was under way."""
    folder = quantized(4, 4, 8)  # which rounds alike however a prompt is cut
    failing = 0
    compute = Follower.compute

    def fails(self: Follower, *words: Any) -> Any:
        nonlocal failing
        if self.rank == rank and failing:
            failing -= 1
            if not failing:
                raise RequestError("the disk is gone")
        return compute(self, *words)

    monkeypatch.setattr(Follower, "compute", fails)

    def measure(engine: Engine) -> list[Any]:
        nonlocal failing
        expected = ask(engine)
        for when in (1, 2):
            failing = when
            with pytest.raises(RequestError, match=f"^rank {rank}: the disk is gone$"):
                engine.logits(prompt(600))
            assert equal(ask(engine), expected)
        with engine.session() as session:
            first = list(session.complete(prompt(9), GREEDY))
            for when in (1, 3):
                failing = when
                with pytest.raises(RequestError, match=f"^rank {rank}: the disk is gone$"):
                    list(session.complete(prompt(20, 4), GREEDY))
                assert list(session.complete(prompt(9), GREEDY)) == first
        return expected

    over_ranks(folder, (1, 2, 1), measure, **CPU)


def test_an_interrupt_while_others_compute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was under way is dropped, also what comes back after the next request has begun."""
    take, left = Pipeline.take, -1

    def interrupted(self: Pipeline) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        take(self)
        if left == -100:
            left = -1
            raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "take", interrupted)

    def measure(engine: Engine) -> None:
        nonlocal left
        expected = ask(engine)
        for when in (1, 2, -99):
            left = when
            with pytest.raises(KeyboardInterrupt):
                engine.logits(prompt(600))
            assert equal(ask(engine), expected)

    over_ranks(folder, (1, 2, 1), measure, **CPU)


def test_texts_that_are_gone_are_forgotten_everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    followers = list[Follower]()
    make = Follower.__init__

    def remembered(self: Follower, *words: Any) -> None:
        make(self, *words)
        followers.append(self)

    monkeypatch.setattr(Follower, "__init__", remembered)

    def measure(engine: Engine) -> None:
        sessions = [engine.session() for _ in range(5)]
        for n, session in enumerate(sessions):
            list(session.complete(prompt(9, n), GREEDY))
        assert [len(follower.kvs) for follower in followers] == [5, 5]
        del session
        while sessions:
            sessions.pop().close()
            gc.collect()
            list(engine.generate(prompt(3), GREEDY))
            kept = [len(sessions) + 1] * 2  # one is kept for the next session
            assert [len(follower.kvs) for follower in followers] == kept
        assert all(len(follower.runner.idle_kvs) == 1 for follower in followers)

    over_ranks(folder, (1, 2, 1), measure, **CPU)


def test_planning_without_loading(folder: Path) -> None:
    """Gives the plans that engines keep to."""
    options = options_for((1, 2, 1), **CPU)
    found = on_ranks(3, lambda meeting: plan_named_ranks(folder, options, meeting))

    def plans(engine: Engine) -> dict[str, Any]:
        assert engine.rank_plans
        return engine.rank_plans.as_dict()

    expected = over_ranks(folder, (1, 2, 1), plans, **CPU)
    assert [found[rank][0] for rank in range(3)] == [0, 1, 2]
    assert all(found[rank][1].as_dict() == expected for rank in range(3))


def test_only_rank_0_takes_requests(folder: Path) -> None:
    refused = list[str]()
    follow = Engine.follow

    def tries(self: Engine) -> None:
        line = "^this is rank 1, and rank 0 takes requests; call follow here$"
        asked = self.session, self.batch, lambda: self.generate([1]), lambda: self.logits([1])
        for request in asked:
            with pytest.raises(RequestError, match=line):
                request()
            refused.append("")
        follow(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "follow", tries)

        def measure(engine: Engine) -> None:
            with pytest.raises(RequestError, match="only ranks other than 0 can follow"):
                follow(engine)
            plans = engine.rank_plans
            assert plans and (engine.rank, engine.distributed, len(plans.plans)) == (0, True, 2)
            list(engine.generate([1], GREEDY))

        over_ranks(folder, (2, 2), measure, **CPU)
    assert len(refused) == 4
    with Engine.load(folder, EngineOptions(**CPU)) as alone:  # type: ignore[arg-type]
        assert (alone.rank, alone.distributed, alone.rank_plans) == (0, False, None)
        with pytest.raises(RequestError, match="only ranks other than 0"):
            alone.follow()


@pytest.mark.parametrize("loads", [True, False])
def test_other_ranks_hear_of_an_interrupt(folder: Path, loads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C on rank 1, while it loads or waits for orders."""

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    def work(meeting: Meeting) -> str:
        progress = interrupted if loads and meeting.rank else None
        try:
            with Engine(*start_rank(folder, options, progress, None, None, None, meeting)) as engine:
                while not engine.rank:
                    engine.check_ranks()
                    time.sleep(0.01)
                engine.follow()
        except (RequestError, KeyboardInterrupt) as error:
            return str(error)
        return "it ends as if all were well"

    options = options_for((2, 2), **CPU)
    monkeypatch.setattr(Follower, "follow", interrupted)
    assert on_ranks(2, work) == {0: "rank 1: interrupted", 1: ""}
