"""Damaged and forged files of saved sessions. A forged one has the right digest, which anyone can compute."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from dev.harness.answers import GREEDY
from dev.harness.mutate.header import File, damaged
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import RESIDENT, Subject
from runtime import Engine, Session

TURNS = ("def alpha", "and beta?")


@contextmanager
def open_sessions(subject: Subject) -> Iterator[Case]:
    file = subject.work("sessions") / "talk.session"
    with Engine.load(subject.native, RESIDENT) as engine:
        known = saved(engine, file)
        original = file.read_bytes()

        def case(chance: Random) -> Verdict:
            if chance.random() < 0.1:
                file.write_bytes(original)
                with engine.restore(file) as session:
                    if say(session, TURNS[1]) != known:
                        raise Wrong("a restored session does not go on as the saved one did")
                return Verdict.ACCEPTED
            data = damaged(File.parse(original), chance)
            forged = chance.random() < 0.6
            file.write_bytes(signed(data) if forged else data)
            with engine.restore(file) as session:
                if not forged and data != original:
                    raise Wrong("damage without a right digest went unnoticed")
                if session.messages and session.messages[-1]["role"] == "user":
                    session.messages.pop()  # a forger's question
                say(session, TURNS[1])
            return Verdict.ACCEPTED

        yield case


def saved(engine: Engine, file: Path) -> list[int]:
    """Save a session of one turn. Returns the ids of the next turn."""
    with engine.session("Be brief.") as session:
        say(session, TURNS[0])
        session.save(file)
        return say(session, TURNS[1])


def say(session: Session, message: str) -> list[int]:
    session.send(message)
    return [token.id for token in session.generate(GREEDY)]


def signed(data: bytes) -> bytes:
    body = data[: -hashlib.sha256().digest_size]
    return body + hashlib.sha256(body).digest()
