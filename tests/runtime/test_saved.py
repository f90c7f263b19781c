"""Saved conversations: another process goes on with the same bits, and a killed one leaves a whole file."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from runtime import Engine, RequestError, SamplingParams, Session

MESSAGES = ["def alpha", "and beta?", "  gamma\n", "\u00e9\u4e2d\U0001f600", 'return "\\"', "delta 7"]


def params(seed: int = 3, count: int = 9) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0.9, seed=seed, ignore_eos=True)


def answer(session: Session, message: str, seed: int = 3) -> list[tuple[int, str, str]]:
    """The next turn's ids, texts, and log-probabilities to the last bit."""
    session.send(message)
    return [(token.id, token.text, token.logprob.hex()) for token in session.generate(params(seed))]


def held(session: Session) -> dict[str, bytes]:
    """All bits of a session's keys and values."""
    parts = session.kv.parts(len(session.ids))
    return {name: part.contiguous().view(torch.uint8).numpy().tobytes() for name, part in parts.items()}


def state(session: Session) -> tuple[Any, ...]:
    return session.messages, session.ids, held(session)


@pytest.mark.parametrize("options", [{}, {"slots": 2}, {"dtype": "bfloat16"}, {"kv": 8}], ids=str)
def test_a_restored_conversation_goes_on_with_the_same_bits(
    load: Callable[..., Engine], tmp_path: Path, options: dict[str, Any]
) -> None:
    chance, file = Random(5), tmp_path / "talk.session"
    engine, other = load(**options), load(**options)
    for _ in range(4):
        undisturbed = engine.session(chance.choice([None, "Be brief."]))
        for turn in range(chance.randint(0, 4)):
            answer(undisturbed, chance.choice(MESSAGES), turn)
        undisturbed.save(file)
        with other.session() as stranger:  # whose KV cache the restored session takes over
            answer(stranger, "something else entirely, and longer" * 3)
        with chance.choice([engine, other]).restore(file) as session:
            assert state(session) == state(undisturbed)
            for message in chance.sample(MESSAGES, 2):
                assert answer(session, message) == answer(undisturbed, message)
            assert state(session) == state(undisturbed)


OTHER_PROCESS = """
import json, sys
from runtime import Engine, EngineOptions, SamplingParams
answers = []
for slots in (None, 2):
    with Engine.load(sys.argv[1], EngineOptions(device="cpu", dtype="float32", slots=slots)) as engine:
        session = engine.restore(sys.argv[2])
        before = engine.stats().prompt_tokens
        session.send("and beta?")
        params = SamplingParams(max_new_tokens=9, temperature=0.9, seed=3, ignore_eos=True)
        tokens = [(token.id, token.text, token.logprob.hex()) for token in session.generate(params)]
        answers.append([tokens, engine.stats().prompt_tokens - before])
        session.save(sys.argv[3])
print(json.dumps(answers))
"""


def test_another_process_goes_on_with_the_same_bits_resident_and_offloaded(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    session = engine.session("Be brief.")
    answer(session, "def alpha")
    session.save(tmp_path / "talk.session")
    there, back = str(tmp_path / "talk.session"), str(tmp_path / "back.session")
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(checkpoint), there, back],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = engine.stats().prompt_tokens
    expected = answer(session, "and beta?")
    computed = engine.stats().prompt_tokens - before
    assert computed < len(session.ids) - len(expected)  # the first turn is not computed again
    for tokens, prompt_tokens in json.loads(done.stdout):
        assert [tuple(token) for token in tokens] == expected
        assert prompt_tokens == computed
    assert state(engine.restore(back)) == state(session)


def test_a_question_without_an_answer_is_answered_later(engine: Engine, tmp_path: Path) -> None:
    session = engine.session()
    answer(session, "def alpha")
    session.send("and beta?")
    session.save(tmp_path / "s")
    restored = engine.restore(tmp_path / "s")
    expected = [token.logprob for token in session.generate(params())]
    assert [token.logprob for token in restored.generate(params())] == expected


def test_saved_within_an_answer_it_goes_on_as_if_the_caller_had_stopped_there(
    engine: Engine, tmp_path: Path
) -> None:
    session = engine.session()
    session.send("def alpha")
    tokens = session.generate(params())
    for _ in range(4):
        next(tokens)
    session.save(tmp_path / "s")
    rest = [token.logprob for token in tokens]
    assert len(rest) == 5  # saving does not disturb it
    restored, stopped = engine.restore(tmp_path / "s"), engine.session()
    stopped.send("def alpha")
    early = stopped.generate(params())
    for _ in range(4):
        next(early)
    assert state(restored) == state(stopped)
    assert answer(restored, "and beta?") == answer(stopped, "and beta?")


def test_a_completed_text_is_saved_too(engine: Engine, tmp_path: Path) -> None:
    session, ids = engine.session(), engine.tokenizer.encode("def alpha_beta")
    made = [token.id for token in session.complete(ids, params())]
    session.save(str(tmp_path / "s"))
    restored, before = engine.restore(str(tmp_path / "s")), engine.stats()
    longer = ids + made + [7]
    again = [token.logprob for token in restored.complete(longer, params())]
    assert again == [token.logprob for token in session.complete(longer, params())]
    assert engine.stats().reused_tokens - before.reused_tokens == 2 * (len(longer) - 2)


def test_after_an_interrupt_between_two_chunks_only_what_is_certain_is_saved(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    answer(session, "def alpha")
    kept = list(session.ids)
    forward, calls = engine.runner.model.forward, 0

    def interrupted(*words: Any, **named: Any) -> Any:
        nonlocal calls
        if calls:
            raise KeyboardInterrupt
        calls += 1
        return forward(*words, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.runner.model, "forward", interrupted)
        next(session.complete(kept + [5] * 600, params()))
    assert session.kv.length > len(session.ids) == len(kept)
    session.save(tmp_path / "s")
    restored = engine.restore(tmp_path / "s")
    assert (restored.ids, restored.kv.length) == (kept, len(kept))
    assert answer(restored, "and beta?") == answer(session, "and beta?")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from model.checkpoint import Identity
from model.config import ModelConfig
from model.kv_cache import KVCache
from runtime.held import HeldHere
from runtime.saved import load_session, save_session

config = ModelConfig(vocab=400, hidden=64, layers=2, heads=4, kv_heads=4, head_dim=32, ffn=32, experts=4,
                     experts_per_token=2, context=512, rope_theta=1e4, norm_eps=1e-5)
runner = SimpleNamespace(identity=Identity("m", "0"), dtype=torch.float32, config=config, held=HeldHere)
chance, file, cpu = random.Random(7), Path(sys.argv[1]), torch.device("cpu")

def conversation(length):
    kv = KVCache.allocate(config, 1, 512, torch.float32, cpu)
    for n, part in enumerate(kv.parts(length).values()):
        part.copy_(torch.full(part.shape, length + n / 8, device=cpu))
    return [{"role": "user", "content": f"{length}"}], [length % 400] * length, kv

def found():
    kv = KVCache.allocate(config, 1, 512, torch.float32, cpu)
    messages, ids = load_session(file, runner, kv)
    return messages, ids, [part.clone() for part in kv.parts(len(ids)).values()]

def same(found, expected):
    messages, ids, kv = expected
    parts = kv.parts(len(ids)).values()
    return found[:2] == (messages, ids) and all(map(torch.equal, found[2], parts))

both = conversation(300), conversation(511)
began = time.perf_counter()
for each in (*both, *both):
    save_session(file, runner, *each)
patience = (time.perf_counter() - began) * 3 / 4  # as long as three take
midway, outcomes = 0, [0, 0]
for turn in range(24):
    child = os.fork()
    if child == 0:
        while True:
            for each in both[:: 1 - 2 * (turn % 2)]:
                save_session(file, runner, *each)
    time.sleep(chance.uniform(0, patience))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    midway += file.with_name(file.name + ".part").exists()
    matches = [same(found(), each) for each in both]
    assert sum(matches) == 1, matches
    outcomes[matches.index(True)] += 1
save_session(file, runner, *both[1])
assert same(found(), both[1]) and os.listdir(file.parent) == [file.name]
print(midway, *outcomes)
"""


def test_killed_while_saving_it_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "talk.session")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    midway, *outcomes = map(int, done.stdout.split())
    assert midway >= 5 and min(outcomes) >= 1  # else the kills did not come while it was saving


def test_two_that_save_to_one_file_leave_one_of_theirs(engine: Engine, tmp_path: Path) -> None:
    file, sessions = tmp_path / "s", [engine.session(), engine.session()]
    for session, message in zip(sessions, ("def alpha", "and beta?"), strict=True):
        answer(session, message)
    failures: list[BaseException] = []

    def save(session: Session) -> None:
        try:
            for _ in range(12):
                session.save(file)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if file.exists():
            restored = engine.restore(file)
            assert state(restored) in [state(session) for session in sessions]
            restored.close()
    assert failures == [] and [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.fixture
def spoken(engine: Engine) -> Iterator[Session]:
    with engine.session() as session:
        answer(session, "def alpha")
        yield session


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/s", "No such file or directory"),
        ("file/s", "Not a directory"),
        ("folder", "Is a directory"),
        ("nul\0", "null"),
        ("x" * 300, "File name too long"),
    ],
)
def test_where_it_cannot_be_written_one_line_says_so(
    spoken: Session, tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match=f"cannot be written .*{reason}") as caught:
        spoken.save(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    answer(spoken, "and beta?")


def test_a_failed_save_leaves_the_old_file(
    spoken: Session, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s"
    spoken.save(file)
    before = file.read_bytes()
    answer(spoken, "and beta?")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RequestError, match=r"s: cannot be written \(No space left on device\)"):
            spoken.save(file)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_file_that_others_may_not_read_stays_so(spoken: Session, tmp_path: Path) -> None:
    for mode in (0o600, 0o640):
        spoken.save(tmp_path / "s")
        (tmp_path / "s").chmod(mode)
        spoken.save(tmp_path / "s")
        assert (tmp_path / "s").stat().st_mode & 0o777 == mode


def test_a_closed_session_is_not_saved(spoken: Session, tmp_path: Path) -> None:
    spoken.close()
    with pytest.raises(RequestError, match="the session is closed"):
        spoken.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_in_the_middle_of_a_forward_it_is_not_saved(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, model, said = engine.session(), engine.runner.model, []

    def refused_in(forward: Callable[..., Any]) -> Callable[..., Any]:
        def interrupting(*words: Any, **named: Any) -> Any:
            with pytest.raises(RequestError, match="computing a token") as caught:
                session.save(tmp_path / "s")
            said.append(caught)
            return forward(*words, **named)

        return interrupting

    for name in ("forward", "decode"):
        monkeypatch.setattr(model, name, refused_in(getattr(model, name)))
    answer(session, "def alpha")
    assert len(said) == 9 and list(tmp_path.iterdir()) == []
