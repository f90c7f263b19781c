"""A conversation's commands, failures, interrupts and full contexts, on the random model."""

from collections.abc import Callable, Iterator

import pytest

from runtime import Engine, RequestError, SamplingParams, Session, Token
from runtime.shell import conversation as module
from runtime.shell.ranks import Stopped
from tests.runtime.shell.talking import PARAMS, Talk, Typed

HINT = "Ctrl-C once more ends the program, and so does Ctrl-D"


def test_turns(talk: Talk, answers: Callable[..., list[str]]) -> None:
    talk("one", "", "  ", "two")
    assert (talk.out, talk.err) == ("".join(answers("one", "two")), [""])
    talk(" /reset", "/etc/hosts is what?", system="s")
    assert (talk.out, talk.err) == ("".join(answers(" /reset", "/etc/hosts is what?", system="s")), [""])


# --- commands


def test_reset_begins_anew_and_keeps_the_system_message(
    talk: Talk, answers: Callable[..., list[str]]
) -> None:
    talk("/reset", "one", "/reset", "two", system="s")
    assert talk.out == "".join(answers("one", system="s") + answers("two", system="s"))
    assert talk.err == [*["a new conversation begins"] * 2, ""]


def test_retry_answers_the_last_message_again(talk: Talk, answers: Callable[..., list[str]]) -> None:
    talk("/retry", "one", "two", "/retry", "three")
    one, two, three = answers("one", "two", "three")
    assert talk.out == one + two + two + three
    assert talk.err == ["error: there is no answer yet that could be given again; write a message", ""]


def test_stats(talk: Talk) -> None:
    talk("/stats", "one", "two", "/stats", "/reset", "/stats", "/quit", "three")
    assert talk.err[0] == "turns: 0; the context holds 0 of 640 tokens"
    held = next(line for line in talk.err if line.startswith("turns: 2;"))
    assert held == f"turns: 2; the context holds {len(talk.session.ids)} of 640 tokens"
    assert f"decode {2 * 11} tokens" in talk.err[talk.err.index(held) + 1]
    assert talk.err.count("turns: 0; the context holds 0 of 640 tokens") == 2
    assert talk.err[-1].startswith("first token ")  # nothing comes after /quit


def test_help_names_every_command_and_unknown_ones_are_named(talk: Talk) -> None:
    talk("/help", "/frobnicate now", "/reset all", "/RESET", "/quit")
    assert talk.out == "" and talk.session.messages == []
    shown = "\n".join(talk.err[:-3])
    assert all(
        f"{name}  " in shown for name in ("/reset", "/retry", "/load FILE", "/stats", "/help", "/quit")
    )
    unknown, argument, upper = talk.err[-3:]
    assert unknown.startswith("error: /frobnicate is no command; /reset, ")
    assert argument == "error: /reset takes nothing after it, and got 'all'"
    assert upper.startswith("error: /RESET is no command")


# --- Ctrl-C


def interrupt_after(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """The first answer of all is interrupted after so many tokens."""
    generate = Session.generate
    counts = [tokens]

    def interrupted(session: Session, params: SamplingParams) -> Iterator[Token]:
        served = generate(session, params)

        def pass_on() -> Iterator[Token]:
            while not counts or counts[0]:
                yield from [next(served)] if counts else served
                if not counts:
                    return
                counts[0] -= 1
            counts.clear()
            raise KeyboardInterrupt

        return pass_on()

    monkeypatch.setattr(Session, "generate", interrupted)


def test_ctrl_c_ends_an_answer_which_stays(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 5)
    talk("one", "two")
    assert talk.err == ["the answer was ended", ""]
    first, second = (talk.session.messages[i]["content"] for i in (1, 3))
    assert first and talk.out == first + "\n" + second
    assert [message["content"] for message in talk.session.messages[::2]] == ["one", "two"]


def test_ctrl_c_before_an_answer_begins_takes_the_message_back(
    talk: Talk, answers: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers("two")
    interrupt_after(monkeypatch, 0)
    talk("one", "two")
    assert talk.err == ["the answer was ended before it began; the conversation is as it was", ""]
    assert talk.out == "\n" + expected[0]


def test_an_interrupted_retry_keeps_the_answer_there_was(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Once(Typed):
        def read(self) -> str | None:
            message = super().read()
            if message == "/retry":
                interrupt_after(monkeypatch, 0)
            return message

    talk.typed = Once
    talk("one", "/retry")
    assert talk.err == ["the answer was ended before it began; the conversation is as it was", ""]
    assert talk.out == talk.session.messages[1]["content"] + "\n" and len(talk.session.messages) == 2


def test_ctrl_c_that_surfaces_as_another_error(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def show(*args: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(module, "show", show)
    talk("one")
    assert talk.err == ["the answer was ended before it began; the conversation is as it was", ""]


def test_ctrl_c_at_the_prompt_hints_once_and_then_ends(talk: Talk) -> None:
    talk(KeyboardInterrupt(), "one", KeyboardInterrupt(), "", KeyboardInterrupt())
    assert talk.err == [HINT, HINT, HINT, ""]
    with pytest.raises(KeyboardInterrupt):
        talk("one", KeyboardInterrupt(), KeyboardInterrupt(), "two")
    assert talk.err == [HINT] and len(talk.session.messages) == 2


# --- failures


def test_a_turn_that_fails_changes_nothing(talk: Talk, answers: Callable[..., list[str]]) -> None:
    talk("one", RequestError("not UTF-8"), "x" * 2000, "two", "caf\udce9", "three")
    assert talk.out == "".join(answers("one", "two", "three"))
    decoding, long, surrogate, last = talk.err
    assert decoding == "error: not UTF-8" and last == ""
    assert long.startswith("error: the prompt has ") and "context holds 640" in long
    assert surrogate.startswith("error: ") and "surrogate" in surrogate


def test_a_failed_retry_keeps_the_answer_there_was(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Session, params: SamplingParams) -> Iterator[Token]:
        session.messages.pop()
        raise RequestError("no")

    class Failing(Typed):
        def read(self) -> str | None:
            message = super().read()
            if message == "/retry":
                monkeypatch.setattr(Session, "generate", fail)
            return message

    talk.typed = Failing
    talk("one", "/retry")
    assert talk.err == ["error: no", ""]
    assert [message["role"] for message in talk.session.messages] == ["user", "assistant"]


# --- a full context


def test_a_full_context_forgets_the_oldest_turns(talk: Talk, engine: Engine) -> None:
    talk(*(f"message {n} of many" for n in range(26)), system="s")
    notes = [line for line in talk.err if line.startswith("note: ")]
    assert notes and talk.err == [*notes, ""]
    assert notes[0].startswith("note: the context of 640 tokens is full, so the ")
    assert notes[0].endswith("oldest turns are forgotten")
    system, question, *_, last, answer = talk.session.messages
    assert system == {"role": "system", "content": "s"}
    assert question["role"] == "user" and last["content"] == "message 25 of many" and answer["content"]
    with engine.session("s") as fresh:  # what stays is answered as if it were the whole conversation
        fresh.messages[:] = talk.session.messages[:-1]
        assert "".join(token.text for token in fresh.generate(PARAMS)) == answer["content"]


def test_the_remedy_is_named_where_there_is_one(
    load: Callable[..., Engine], capfd: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(load(context=64), capfd)
    talk("one", "two", "x y z " * 30, "three")
    note = next(line for line in talk.err if line.startswith("note: "))
    assert note.endswith("is full, so the oldest turn is forgotten; to keep more, raise --context")
    assert any("error: the prompt has " in line and line.endswith("raise --context") for line in talk.err)


def test_a_message_that_never_fits_makes_nothing_forgotten(talk: Talk) -> None:
    talk(*(f"message {n} of many" for n in range(5)), "x" * 2000)
    assert not any(line.startswith("note: ") for line in talk.err)
    assert len(talk.session.messages) == 10


def test_being_told_to_stop_ends_it(talk: Talk) -> None:
    with pytest.raises(Stopped, match="SIGTERM"):
        talk(Stopped("told to stop (SIGTERM)"), "and this is never read")
    assert talk.err == []
