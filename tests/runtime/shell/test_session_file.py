"""Conversations in files: `--session`, `/save` and `/load`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import Engine, RequestError
from tests.runtime.shell.talking import Talk, Typed


def test_save_and_load(talk: Talk, answers: Callable[..., list[str]], tmp_path: Path) -> None:
    file = tmp_path / "my talk"
    one, two, three = answers("one", "two", "three", system="s")
    talk("one", "two", f"/save {file}", system="s")
    assert talk.err == [f"saved to {file}", ""]
    reused = talk.engine.stats().reused_tokens
    talk("other", f"/load {file} ", "three", "/reset", f"/load {file}", "three")
    assert talk.out == answers("other")[0] + three + three
    assert talk.err.count("the conversation goes on after 2 turns") == 2
    assert talk.reader.remembered == ["one", "two"] * 2  # what was typed, the reader knows
    assert [message["content"] for message in talk.session.messages] == [
        "s",
        "one",
        one,
        "two",
        two,
        "three",
        three,
    ]
    assert talk.engine.stats().reused_tokens - reused > 2 * len(one)


def test_files_that_cannot_be_used_leave_the_conversation(
    talk: Talk, answers: Callable[..., list[str]], tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.write_text("mine, and nothing else")
    talk(
        "one", "/save", "/load", f"/load {tmp_path}/nowhere", f"/load {notes}", f"/load {tmp_path}",
        f"/save {notes}", f"/save {tmp_path}", "/save /nowhere/at/all", "/load ~nobody-there/x", "two",
        system="s",
    )  # fmt: skip
    assert talk.out == "".join(answers("one", "two", system="s"))
    assert talk.err[:3] == [
        "error: /save needs a file: /save FILE",
        "error: /load needs a file: /load FILE",
        f"error: {tmp_path}/nowhere: no such file",
    ]
    assert len(talk.err) == 3 + 6 + 1 and all(line.startswith("error: ") for line in talk.err[:-1])
    assert f"{notes}: is there, and is no saved session, so it is not replaced" in talk.err[5]
    assert notes.read_text() == "mine, and nothing else"


def test_a_conversation_is_kept_in_its_file_after_each_turn(
    talk: Talk, answers: Callable[..., list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "talk.session"
    kept = []

    class Watching(Typed):
        def read(self) -> str | None:
            with talk.engine.restore(file) if file.exists() else talk.engine.session() as session:
                kept.append([message["content"] for message in session.messages])
            return super().read()

    expected = answers("one", "two", "three", system="s")
    talk.typed = Watching
    talk("", "one", "/stats", "two", system="s", path=file)
    talk.typed = Typed
    first, second = ["s", "one", expected[0]], ["two", expected[1]]
    assert kept == [[], [], first, first, first + second]
    talk("three", "/reset", path=file)
    assert talk.out == expected[2] and talk.err[0] == "the conversation goes on after 2 turns"
    with talk.engine.restore(file) as session:
        assert session.messages == [{"role": "system", "content": "s"}]
    talk("one", "/save", "/load", "two", path=file)
    assert talk.out == "".join(expected[:2])


def test_nothing_is_written_where_nothing_is_said(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.session"
    talk("", "/stats", "/reset", system="s", path=file)
    assert not file.exists()


def test_a_system_message_takes_the_place_of_the_files(
    talk: Talk, answers: Callable[..., list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "talk.session"
    talk("one", system="s", path=file)
    talk(system="t", path=file)
    assert talk.session.messages[0] == {"role": "system", "content": "t"} and len(talk.session.messages) == 3
    talk("/reset", "one", path=file)
    assert talk.out == answers("one", system="t")[0]
    talk(system="", path=file)
    assert talk.session.messages[0]["role"] == "user"


def test_a_message_without_an_answer_is_left_out(talk: Talk, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "talk.session"
    with engine.session() as session:
        session.send("unanswered")
        session.save(file)
    talk("one", path=file)
    assert talk.err == [f"note: {file}: its last message has no answer, and is left out: 'unanswered'", ""]
    assert [message["role"] for message in talk.session.messages] == ["user", "assistant"]
    assert talk.session.messages[0]["content"] == "one"


def test_a_file_that_cannot_be_written_is_said_and_at_the_end_an_error(
    talk: Talk, answers: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(RequestError, match="cannot be written"):
        talk("one", "two", path=folder / "talk.session")
    assert talk.out == "".join(answers("one", "two"))
    assert len(talk.err) == 3 and all("talk.session: cannot be written" in line for line in talk.err[:2])
