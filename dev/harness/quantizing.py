"""Runs of `tools.quantize` on the subject, and what they have to leave."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

from dev.harness.command import DONE, INTERRUPTED, Ended, run_main
from dev.harness.outcome import Wrong
from dev.harness.subject import FORMATS, Subject
from model.checkpoint import open_checkpoint
from model.checkpoint.writer import Writer
from model.errors import ModelError
from tools.quantize import command
from tools.quantize.journal import NAME as JOURNAL
from tools.quantize.lock import NAME as LOCK

__all__ = ["JOURNAL", "check_left", "contents", "finish", "interrupt", "quantize"]


def quantize(source: Path, out: Path, *flags: str) -> Ended:
    return run_main(command.main, [str(source), str(out), *FORMATS, "--threads", "1", "--quiet", *flags])


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which is empty, and stays where it cannot be removed."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name != LOCK)
    return {path.name: path.read_bytes() for path in files}


def interrupt(subject: Subject, out: Path, write: int) -> None:
    """Interrupt a run after `write` tensors, and leave its files in `out`."""
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
    """Raises `Wrong` for a folder that opens as a checkpoint and is not a whole one."""
    if not (out / "config.json").is_file():
        with contextlib.suppress(ModelError):
            open_checkpoint(out)
            raise Wrong("there is no config.json, and the folder opens as a checkpoint")
        return
    found = contents(out)
    found.pop(JOURNAL, None)
    different = [name for name in expected if found.get(name) != expected[name]]
    if different:
        raise Wrong(f"there is a config.json, and {different[0]} is wrong")


def finish(subject: Subject, out: Path, expected: dict[str, bytes]) -> None:
    """Take up a run that was broken off, unless it was done. Raises `Wrong` if that does not end in what is
    expected."""
    if out.is_dir() and contents(out) == expected:
        return
    if (again := quantize(subject.hf, out)).status != DONE:
        raise Wrong(f"the same command again ends with {again.status}: {again.said}")
    if contents(out) != expected:
        raise Wrong("after a run was broken off and resumed, the result is wrong")
