"""Conversations: the KV cache kept between turns changes the cost and nothing else."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import Engine, RequestError, SamplingParams, Session


def greedy(count: int = 12) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)


def ids_of(tokens: Any) -> list[int]:
    return [token.id for token in tokens]


def fresh(engine: Engine, ids: list[int], count: int = 12) -> list[int]:
    """What a new session generates."""
    return ids_of(engine.generate(ids, greedy(count)))


@pytest.fixture(params=["V1", "V3"])
def talker(request: pytest.FixtureRequest, load: Callable[..., Engine], v3_checkpoint: Path) -> Engine:
    """An engine for each chat format."""
    engine = load(v3_checkpoint) if request.param == "V3" else load()
    assert engine.tokenizer.chat_version.name == request.param
    return engine


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_each_turn_is_what_the_whole_conversation_gives_to_a_stranger(
    talker: Engine, system: str | None
) -> None:
    session = talker.session(system)
    expected_messages = [{"role": "system", "content": system}] if system else []
    for turn, message in enumerate(["def alpha", "and beta?", "  gamma\n"]):
        session.send(message)
        expected_messages.append({"role": "user", "content": message})
        prompt = talker.tokenizer.encode_chat(expected_messages)
        before = talker.stats()
        tokens = list(session.generate(greedy()))
        after = talker.stats()
        assert ids_of(tokens) == fresh(talker, prompt)
        assert session.ids == prompt + ids_of(tokens)[:-1]
        assert after.prompt_tokens + after.reused_tokens - before.reused_tokens - before.prompt_tokens == len(
            prompt
        )
        assert (after.reused_tokens > before.reused_tokens) is (turn > 0)
        answer = "".join(token.text for token in tokens)
        assert answer == talker.tokenizer.decode(ids_of(tokens))
        expected_messages.append({"role": "assistant", "content": answer})
        assert session.messages == expected_messages


def test_a_growing_text_is_computed_once(engine: Engine) -> None:
    session, ids = engine.session(), engine.tokenizer.encode("def alpha_beta(alpha, n=7): return")
    for end, reused in ((5, 0), (9, 5), (9, 8), (len(ids), 9)):
        engine.runner.counters.__init__()  # type: ignore[misc]
        list(session.complete(ids[:end], greedy(1)))
        stats = engine.stats()
        assert (stats.reused_tokens, stats.prompt_tokens) == (reused, end - reused)


@pytest.mark.parametrize("common", [0, 1, 4, 8, 9])
def test_what_follows_the_common_beginning_is_computed_afresh(engine: Engine, common: int) -> None:
    first = engine.tokenizer.encode("def alpha_beta(alpha, n=7): return")[:9]
    second = first[:common] + [7, 8, 9, 10, 11][: 9 - common]
    session = engine.session()
    list(session.complete(first, greedy()))
    before = engine.stats().reused_tokens
    assert ids_of(session.complete(second, greedy())) == fresh(engine, second)
    assert engine.stats().reused_tokens - before == min(common, len(second) - 1)
    assert ids_of(session.complete(first, greedy())) == fresh(engine, first)


def test_a_sessions_own_answer_is_reused(engine: Engine) -> None:
    session, ids = engine.session(), engine.tokenizer.encode("def alpha")
    made = ids_of(session.complete(ids, greedy(20)))
    before = engine.stats()
    assert ids_of(session.complete(ids + made[:10], greedy(10))) == made[10:]
    assert engine.stats().reused_tokens - before.reused_tokens == len(ids) + 9


def test_an_interrupt_while_the_kv_cache_is_cut_back_leaves_the_session_usable(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, ids = engine.session(), [5, 6, 7, 8, 9, 10]
    assert ids_of(session.complete(ids, greedy())) == fresh(engine, ids)
    truncate = session.kv.truncate

    def interrupted(length: int) -> None:
        truncate(length)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session.kv, "truncate", interrupted)
        next(session.complete([5, 6, 11], greedy()))
    assert ids_of(session.complete(ids, greedy())) == fresh(engine, ids)


def test_sessions_taken_in_turns_do_not_mix(engine: Engine) -> None:
    alone = []
    for message in ("alpha?", "beta?"):
        session = engine.session()
        session.send(message)
        alone.append(ids_of(session.generate(greedy())))
    sessions = [engine.session(), engine.session()]
    for session, message in zip(sessions, ("alpha?", "beta?"), strict=True):
        session.send(message)
    both = list(zip(*(session.generate(greedy()) for session in sessions), strict=True))
    assert [ids_of(tokens) for tokens in zip(*both, strict=True)] == alone


def test_turns_must_alternate(engine: Engine) -> None:
    session = engine.session()
    with pytest.raises(RequestError, match="call send first"):
        session.generate()
    session.send("one")
    with pytest.raises(RequestError, match="has not been answered"):
        session.send("two")
    list(session.generate(greedy(2)))
    with pytest.raises(RequestError, match="call send first"):
        session.generate()


@pytest.mark.parametrize(
    ("message", "params"),
    [
        ("x" * 3000, greedy()),
        ("\ud800", greedy()),
        ("fine", SamplingParams(logit_bias={400: 0.0})),
        ("fine", SamplingParams(logit_bias=dict.fromkeys(range(400), -math.inf))),
    ],
)
def test_a_message_that_cannot_be_answered_is_taken_back(
    engine: Engine, message: str, params: SamplingParams
) -> None:
    def talk(stumble: bool) -> tuple[list[int], Session]:
        session = engine.session()
        session.send("def alpha")
        list(session.generate(greedy()))
        if stumble:
            messages = list(session.messages)
            session.send(message)
            with pytest.raises(RequestError):
                list(session.generate(params))
            assert session.messages == messages
        session.send("and beta?")
        return ids_of(session.generate(greedy())), session

    ids, session = talk(stumble=True)
    expected, reference = talk(stumble=False)
    assert (ids, session.messages, session.ids) == (expected, reference.messages, reference.ids)


def test_an_answer_left_midway_is_the_answer(engine: Engine) -> None:
    session = engine.session()
    session.send("def alpha")
    tokens = session.generate(greedy())
    partial = "".join(next(tokens).text for _ in range(4))
    tokens.close()  # type: ignore[attr-defined]
    assert session.messages[-1] == {"role": "assistant", "content": partial}
    session.send("and beta?")
    prompt = engine.tokenizer.encode_chat(session.messages)
    assert ids_of(session.generate(greedy())) == fresh(engine, prompt)


def test_a_new_request_ends_the_one_before(engine: Engine) -> None:
    session, ids = engine.session(), engine.tokenizer.encode("def alpha")
    old = session.complete([1, 5, 6], greedy())
    next(old)
    new = session.complete(ids, greedy())
    made = [next(new).id]
    with pytest.raises(RequestError, match="another request"):
        next(old)
    assert made + ids_of(new) == fresh(engine, ids)


def test_closed_sessions_serve_nothing_and_their_cache_goes_to_one_other(load: Callable[..., Engine]) -> None:
    engine = load()
    session, ids = engine.session(), engine.tokenizer.encode("def alpha")
    tokens, unbegun = session.complete([1, 5, 6], greedy()), session.complete([1, 5, 6], greedy())
    next(tokens)
    session.close()
    session.close()
    a, b = engine.session(), engine.session()
    assert a.kv is session.kv is not b.kv
    made = [token.id for token, _ in zip(a.complete(ids, greedy()), range(3), strict=False)]
    for use in (lambda: next(tokens), lambda: next(unbegun), lambda: session.complete(ids)):
        with pytest.raises(RequestError, match="the session is closed"):
            use()
    assert made == fresh(engine, ids)[:3]
