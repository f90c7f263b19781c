"""Many requests in one step: each writes what it writes alone."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime import Engine, EngineOptions, RequestError, SamplingParams
from runtime.answer import Token
from runtime.batching.batch import Batch, Request, Work
from runtime.batching.scheduler import QueueFull
from runtime.engine import DEMO
from tests.quantized import quantize_folder

PROMPTS = (
    "def read(",
    "import os\n\nclass A:",
    "x",
    "for i in range(10):\n    print(i",
    '"""Return the ',
    "return",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(options=EngineOptions(device="cpu", context=256, parallel=4)) as engine:
        yield engine


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_folder(DEMO, tmp_path_factory.mktemp("batch") / "demo", "4")


def work(engine: Engine, n: int, seed: int, **options: object) -> Work:
    r = random.Random(seed * 1000 + n)
    ids = engine.tokenizer.encode(PROMPTS[n % len(PROMPTS)])
    if r.random() < 0.2:
        ids += [r.randrange(300, 2000) for _ in range(r.randint(1, 120))]
    params = SamplingParams(
        max_new_tokens=r.randint(1, 24), temperature=r.choice((0, 0.7, 1.2)), seed=n,
        repetition_penalty=r.choice((1, 1.3)), frequency_penalty=r.choice((0, 0.4)),
        stop=r.choice(((), ("\n", "self"))), top_logprobs=r.choice((0, 3)),
    )  # fmt: skip
    return Work(ids, params, engine.tokenizer.stream(ids), **options)  # type: ignore[arg-type]


def alone(engine: Engine, n: int, seed: int) -> list[Token]:
    each = work(engine, n, seed)
    return list(engine.generate(each.ids, each.params))


def run(batch: Batch, requests: list[Request]) -> dict[Request, list[Token | RequestError]]:
    got: dict[Request, list[Token | RequestError]] = {request: [] for request in requests}
    while batch.busy:
        for request, result in batch.step():
            got[request].append(result)
    return got


@pytest.mark.parametrize(
    "options", [{}, {"slots": 4}, {"slots": 3, "berths": 30}, {"dtype": "bfloat16"}, {"kv": 8}]
)
def test_each_writes_what_it_writes_alone(
    engine: Engine, quantized: Path, options: dict[str, object]
) -> None:
    """On the demo in float32, and quantized with experts in slots and in files."""
    folder = quantized if options else None
    with Engine.load(folder, EngineOptions(device="cpu", context=256, parallel=3, **options)) as other:  # type: ignore[arg-type]
        expected = [alone(other, n, 1) for n in range(9)]
        with other.batch() as batch:
            got = run(batch, [batch.add(work(other, n, 1, reuse=False)) for n in range(9)])
        assert list(got.values()) == expected
        assert other.stats().requests == 18


def test_arrivals_and_departures_change_no_text(engine: Engine) -> None:
    r, expected, running = random.Random(5), [alone(engine, n, 2) for n in range(14)], list[Request]()
    got: dict[Request, list[Token | RequestError]] = {}
    with engine.batch() as batch:
        begun, given_up = 0, set[Request]()
        while begun < 14 or batch.busy:
            while begun < 14 and r.random() < 0.4:
                running.append(batch.add(work(engine, begun, 2, reuse=False)))
                got[running[-1]] = []
                begun += 1
            if running and r.random() < 0.05:
                given_up.add(gone := r.choice(running))
                batch.cancel(gone)
            for request, result in batch.step():
                assert request not in given_up
                got[request].append(result)
        for n, request in enumerate(running):
            if request in given_up:
                assert got[request] == expected[n][: len(got[request])]
            else:
                assert got[request] == expected[n]
        assert given_up and all(not text.busy for text in batch.texts.all)


def test_a_beginning_is_computed_once(engine: Engine) -> None:
    """Also if requests with the same prompt come together, as the choices of one request do."""
    ids = engine.tokenizer.encode("class Reader:\n    def __init__(self, file):\n        self.file = ")
    params = SamplingParams(max_new_tokens=6, temperature=0)
    expected = list(engine.generate(ids, params))
    before = engine.stats()
    with engine.batch() as batch:
        requests = [batch.add(Work(ids, params, engine.tokenizer.stream(ids))) for _ in range(4)]
        got = run(batch, requests)
        assert [[t.id for t in tokens] for tokens in got.values()] == [[t.id for t in expected]] * 4  # type: ignore[union-attr]
        assert [request.reused for request in requests] == [0] + [len(ids) - 1] * 3
        more = batch.add(Work([*ids, 9, 9], params, engine.tokenizer.stream(ids)))
        run(batch, [more])
        assert more.reused == len(ids)
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == len(ids) + 3 + 2
    assert after.reused_tokens - before.reused_tokens == 4 * len(ids) - 3


def test_a_running_text_waits_for_one_chunk(variant: Callable[..., Path]) -> None:
    """A prompt of several chunks, while two texts are being written."""
    with Engine.load(variant(), EngineOptions(device="cpu", context=640, parallel=3)) as engine:
        params = SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True)
        with engine.batch() as batch:
            batch.chunk = 100
            first = [batch.add(Work([5, 6 + n], params, engine.tokenizer.stream())) for n in range(2)]
            for _ in range(4):
                batch.step()
            long = batch.add(Work(list(range(10, 300)) * 2, params, engine.tokenizer.stream()))
            kinds = [{request for request, _ in batch.step()} for _ in range(12)]
        assert kinds[:11] == [set(), set(first)] * 5 + [{long}]
        assert kinds[11] == {*first, long}


def test_a_request_that_fails_ends_alone(engine: Engine) -> None:
    good = work(engine, 0, 3, reuse=False)
    expected = alone(engine, 0, 3)
    forbidden = dict.fromkeys(range(engine.config.vocab), -float("inf"))
    bad = SamplingParams(max_new_tokens=5, logit_bias=forbidden)
    with engine.batch() as batch:
        failing = batch.add(Work(good.ids, bad, engine.tokenizer.stream()))
        request = batch.add(good)
        got = run(batch, [failing, request])
    assert got[request] == expected
    assert len(got[failing]) == 1 and "no token can be sampled" in str(got[failing][0])


def test_what_cannot_be_served_is_refused_at_once(engine: Engine) -> None:
    stream = engine.tokenizer.stream()
    with engine.batch(queue=2) as batch:
        for ids, params, words in (
            ([], {}, "the prompt is empty"),
            ([1] * 256, {}, "256 tokens and the context holds 256"),
            ([1, 99999], {}, "99999"),
            ([1], {"logit_bias": {5000: 1.0}}, "names token 5000"),
        ):
            with pytest.raises(RequestError, match=words):
                batch.add(Work(ids, SamplingParams(**params), stream))  # type: ignore[arg-type]
        for _ in range(6):
            batch.add(Work([1, 2], SamplingParams(max_new_tokens=2), engine.tokenizer.stream()))
        with pytest.raises(QueueFull, match="0 requests are being served and 6 wait"):
            batch.add(Work([1, 2], SamplingParams(), stream))
        batch.step()
        with pytest.raises(QueueFull, match="4 requests are being served and 2 wait"):
            batch.add(Work([1, 2], SamplingParams(), stream))
    assert len(engine.runner.idle_kvs) == 4


def test_memory_is_the_plan_s() -> None:
    one, four = (Engine.plan(None, EngineOptions(device="cpu", context=128, parallel=n)) for n in (1, 4))
    assert four.kv_bytes == 4 * one.kv_bytes and four.chunk == one.chunk
    assert "context 4 times 128 tokens" in str(four)
