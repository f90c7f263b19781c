"""Runs of `tools.quantize` on the subject, and what they must leave."""

from pathlib import Path
from typing import Any
from unittest import mock

from dev.harness.command import INTERRUPTED, Ended, run_main
from dev.harness.outcome import Wrong
from dev.harness.subject import FORMATS, Subject
from model.checkpoint.writer import Writer
from tools.quantize import command
from tools.quantize.journal import NAME as JOURNAL

LOCK = "quantize.lock"
__all__ = ["JOURNAL", "check_left", "contents", "interrupt", "quantize"]


def quantize(source: Path, out: Path, *flags: str) -> Ended:
    return run_main(command.main, [str(source), str(out), *FORMATS, "--threads", "1", "--quiet", *flags])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which is empty, and stays where it cannot be removed."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name != LOCK)
    return {path.name: path.read_bytes() for path in files}


def interrupt(subject: Subject, out: Path, write: int) -> None:
    """Leave in `out` what a run leaves that is interrupted at its n-th tensor."""
    done, real = 0, Writer.write

    def counted(self: Writer, *args: Any) -> None:
        nonlocal done
        done += 1
        if done > write:
            raise KeyboardInterrupt
        real(self, *args)

    with mock.patch.object(Writer, "write", counted):
        ended = quantize(subject.hf, out)
    if ended.status != INTERRUPTED or not (out / JOURNAL).is_file():
        raise Wrong(f"interrupted, it ended with {ended.status}: {ended.said}")


def check_left(out: Path, expected: dict[str, bytes]) -> None:
    """A folder with a config.json in it is a whole checkpoint, or the run is not finished and says so."""
    if not (out / "config.json").is_file():
        return
    found = contents(out)
    found.pop(JOURNAL, None)
    different = [name for name in expected if found.get(name) != expected[name]]
    if different:
        raise Wrong(f"there is a config.json, and {different[0]} is not as it has to be")
