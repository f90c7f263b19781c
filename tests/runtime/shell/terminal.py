"""A program on a pseudo terminal, as a user sits before it."""

import codecs
import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
ASKING = "\x1b[?2004h> "  # an editor's prompt, after it has asked for brackets around what is pasted
CTRL_C, CTRL_D, UP, LEFT = "\x03", "\x04", "\x1b[A", "\x1b[D"


def pasted(text: str) -> str:
    """Text as a terminal brackets what is pasted."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """Runs Python with these words. Its three streams are the terminal, except those that `streams` names.

    Ctrl-C that is typed interrupts it, because the terminal is the one that controls the process.
    """

    def __init__(self, *words: object, **streams: Any) -> None:
        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
        environment["INPUTRC"] = os.devnull
        self.process: Any = subprocess.Popen(
            [sys.executable, *map(str, words)],
            **{"stdin": theirs, "stdout": theirs, "stderr": theirs} | streams,
            env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0), pass_fds=(theirs,),
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def type(self, keys: str | bytes) -> None:
        os.write(self.ours, keys.encode() if isinstance(keys, str) else keys)

    def interrupt(self) -> None:
        """Type Ctrl-C once the program waits for a key. An editor that gets one between its prompt and its
        wait acts on it at the next key."""
        state = Path(f"/proc/{self.process.pid}/stat")
        time.sleep(0 if state.exists() else 0.2)
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.002)
        self.type(CTRL_C)

    def until(self, text: str, seconds: float = 60) -> str:
        """What the terminal shows up to the next `text`, which comes last."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.ours], [], [], max(end - time.monotonic(), 0))[0], self.seen
            assert self.more(), f"no {text!r} in {self.seen!r}"
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def rest(self) -> str:
        """What it shows until the program has ended."""
        while self.more():
            pass
        return self.seen

    def more(self) -> bool:
        """Read what it shows next. Returns False if the program has ended."""
        try:
            data = os.read(self.ours, 65536)
        except OSError:
            return False
        self.seen += self.decode(data).replace("\r", "")
        return bool(data)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
