"""Saved conversations over ranks: files have the bytes of one process, and go on over any split."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime import Engine, EngineOptions, RequestError, SamplingParams, Session
from runtime.ranks.follower import Follower
from runtime.ranks.held import check_dtypes
from runtime.ranks.orders import Kind, Order
from runtime.ranks.pipeline import Pipeline
from tests.runtime.ranks.engines import over_ranks

CPU = {"device": "cpu", "threads": 1}
LONG = "def alpha_beta(gamma): return delta " * 12  # its keys do not fit a frame
LAYERS = 4


def answer(session: Session, message: str = "and beta?") -> list[tuple[int, str]]:
    """The next turn's ids, and log-probabilities to the last bit."""
    session.send(message)
    params = SamplingParams(max_new_tokens=6, temperature=0.9, seed=3, ignore_eos=True)
    return [(token.id, token.logprob.hex()) for token in session.generate(params)]


@pytest.fixture(scope="module")
def folder(variant: Callable[..., Path]) -> Path:
    return variant(layers=LAYERS, ffn=64)


@pytest.fixture
def alone(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, EngineOptions(**CPU)) as engine:  # type: ignore[arg-type]
        yield engine


@pytest.mark.parametrize(
    ("splits", "options"),
    [
        (((2, 2), (1, 3)), {"dtype": "float32"}),
        (((1, 1, 2), (2, 2)), {"dtype": "bfloat16", "kv": 8}),
        (((1, 1, 1, 1), (3, 1)), {"dtype": "bfloat16", "slots": 2}),
    ],
)
def test_files_are_those_of_one_process_and_go_on_anywhere(
    folder: Path, tmp_path: Path, splits: tuple[tuple[int, ...], ...], options: dict[str, Any]
) -> None:
    def save(engine: Engine, name: str) -> None:
        for length, messages in enumerate(([], ["hi"], [LONG, "def alpha"])):
            with engine.session("Be brief.") as session:
                for message in messages:
                    answer(session, message)
                session.save(tmp_path / f"{name}{length}")

    def go_on(engine: Engine) -> list[Any]:
        """The next turns, and how many tokens they compute."""
        found: list[Any] = []
        for length in range(3):
            with engine.restore(tmp_path / f"one{length}") as session:
                session.save(tmp_path / "again")
                assert (tmp_path / "again").read_bytes() == (tmp_path / f"one{length}").read_bytes()
                before = engine.stats().prompt_tokens
                found += [answer(session), engine.stats().prompt_tokens - before, answer(session)]
        return found

    together = {**CPU, **options}
    with Engine.load(folder, EngineOptions(**together)) as engine:
        save(engine, "one")
        expected = go_on(engine)
    for layers in splits:
        over_ranks(folder, layers, lambda engine: save(engine, "many"), **together)
        for length in range(3):
            one, many = (tmp_path / f"{name}{length}" for name in ("one", "many"))
            assert one.read_bytes() == many.read_bytes()
        assert over_ranks(folder, layers, go_on, **together) == expected


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, kind: Kind, when: int) -> Iterator[None]:
    """Inside, rank 2 cannot obey the order of this kind that comes after so many."""
    compute, left = Follower.compute, when

    def fails(self: Follower, order: Order, *rest: Any) -> Any:
        nonlocal left
        if self.rank == 2 and order.kind is kind:
            left -= 1
            if left == 0:
                raise RequestError("out of memory")
        return compute(self, order, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Follower, "compute", fails)
        yield


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, kind: Kind, when: int) -> Iterator[None]:
    """Inside, Ctrl-C comes while rank 0 waits for an order of this kind."""
    arrival, left = Pipeline.arrival, when

    def interrupts(self: Pipeline, begun: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return arrival(self, begun)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "arrival", interrupts)
        yield


@pytest.mark.parametrize("trouble", [failing, interrupted])
def test_what_goes_wrong_on_the_way_leaves_everything_as_it_was(
    folder: Path, alone: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Callable[..., Any]
) -> None:
    file = tmp_path / "s"
    with alone.session() as session:
        answer(session, LONG)
        answer(session, "def alpha")
        session.save(tmp_path / "expected")
        expected = answer(session)
        session.save(tmp_path / "later")
    with alone.session() as session:
        first = answer(session, LONG)
    error = RequestError if trouble is failing else KeyboardInterrupt

    def measure(engine: Engine) -> None:
        session = engine.session()
        answer(session, LONG)
        session.save(file)
        before = file.read_bytes()
        answer(session, "def alpha")
        for when in (1, 3, 4):
            with trouble(monkeypatch, Kind.FETCH, when), pytest.raises(error) as caught:
                session.save(file)
            assert error is KeyboardInterrupt or str(caught.value) == "rank 2: out of memory"
            assert file.read_bytes() == before and not file.with_name("s.part").exists()
            with trouble(monkeypatch, Kind.STORE, when), pytest.raises(error):
                engine.restore(file)
            with engine.session() as other:  # in the KV caches that were being filled
                assert answer(other, LONG) == first
        assert answer(session) == expected
        session.save(file)
        assert file.read_bytes() == (tmp_path / "later").read_bytes()
        with engine.restore(tmp_path / "expected") as restored:
            assert answer(restored) == expected

    over_ranks(folder, (1, 1, 2), measure, **CPU)


def test_others_compute_meanwhile(folder: Path, alone: Engine, tmp_path: Path) -> None:
    with alone.session() as session:
        answer(session, LONG)
        session.save(tmp_path / "one")
        expected = [answer(session, f"{n}") for n in range(6)]

    def measure(engine: Engine) -> None:
        session, found, errors = engine.session(), list[Any](), list[BaseException]()

        def talk() -> None:
            try:
                answer(session, LONG)
                found.extend(answer(session, f"{n}") for n in range(6))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=talk)
        thread.start()
        saved = 0
        while thread.is_alive() or not saved:
            with engine.restore(tmp_path / "one") as restored:
                restored.save(tmp_path / "many")
            assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
            saved += 1
        thread.join()
        assert not errors and found == expected

    over_ranks(folder, (2, 2), measure, **CPU)


def test_a_file_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, alone: Engine) -> None:
    with alone.session() as session:
        answer(session, "def alpha")
        session.save(tmp_path / "s")
        length = len(session.ids)
    (tmp_path / "bad").write_bytes((tmp_path / "s").read_bytes()[:-50])

    def measure(engine: Engine) -> None:
        with pytest.raises(RequestError, match=f"has {length} tokens, and the context holds {length - 1}"):
            engine.restore(tmp_path / "s")
        with pytest.raises(RequestError, match="bad: damaged"):
            engine.restore(tmp_path / "bad")

    over_ranks(folder, (2, 2), measure, **CPU, context=length - 1)

    def measure_other(engine: Engine) -> None:
        with pytest.raises(RequestError, match="engine computes in bfloat16; load the model with --dtype"):
            engine.restore(tmp_path / "s")

    over_ranks(folder, (2, 2), measure_other, **CPU, dtype="bfloat16")


def test_ranks_of_different_dtypes_do_not_save() -> None:
    with pytest.raises(RequestError, match=r"^rank 0 computes in bfloat16 and rank 2 in float16, .* --dtype"):
        check_dtypes(["bfloat16", "bfloat16", "float16"])
