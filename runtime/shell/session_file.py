"""Files of conversations: what `--session` keeps, `/save` writes and `/load` reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import quoted
from runtime.errors import RequestError
from runtime.shell.command import say

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.session import Session


class SessionFile:
    """A file that is written when the conversation is no longer what it holds; or none, without a path."""

    def __init__(self, path: Path | None, session: Session) -> None:
        """`session` is what the file holds, or nothing yet that is worth a file."""
        self.path = path
        self.written = list(map(dict, session.messages))

    def keep(self, session: Session) -> None:
        """Write the conversation if it has changed. Raises `RequestError` if that fails."""
        if self.path is not None and session.messages != self.written:
            session.save(self.path)
            self.written = list(map(dict, session.messages))


def restored(engine: Engine, path: Path) -> Session:
    """The session in a file. A last message without an answer is left out, and a note says so. Raises
    `RequestError` if the file cannot be used."""
    session = engine.restore(path)
    if session.messages and session.messages[-1]["role"] == "user":
        message = session.messages.pop()["content"]
        say(f"note: {path}: its last message has no answer, and is left out: {quoted(message)}")
    return session


def check_replaceable(path: Path) -> None:
    """Raises `RequestError` if there is something else than a saved session. A slip in a name must not cost
    a file."""
    from runtime.saved import checked_header  # here, since it imports torch

    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            checked_header(path, file, os.fstat(file.fileno()).st_size)
    except RequestError as error:
        raise RequestError(
            f"{path}: is there, and is no saved session, so it is not replaced; give another name"
        ) from error
