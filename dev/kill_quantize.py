"""Kill the quantizer at many moments, let it go on, and compare with an undisturbed run.

    python -m dev.kill_quantize --random 20   SIGKILL after random times, up to three in a row
    python -m dev.kill_quantize --writes 10      at the moment of writing, renaming or removing a file

Ends with status 1 at the first difference. Runs are forks of this process, so that hqq is imported once.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dev.bench.random_checkpoint import random_checkpoint
from model.checkpoint import open_checkpoint
from model.checkpoint.writer import Writer
from model.config import ModelConfig
from model.errors import ModelError
from tools.quantize import command as quantize
from tools.quantize.journal import NAME as JOURNAL
from tools.quantize.lock import NAME as LOCK

FORMATS = ["--attention", "4", "--experts", "2g64", "--threads", "2", "--quiet"]
KILLED = 9


def shape(size: int) -> ModelConfig:
    return ModelConfig(
        vocab=64, hidden=128 * size, layers=2 + size, heads=4, kv_heads=2, head_dim=32, ffn=256 * size,
        experts=4, experts_per_token=2, context=64, rope_theta=1e4, norm_eps=1e-5,
    )  # fmt: skip


def start(source: Path, out: Path, before: Callable[[], None] | None = None) -> int:
    """The command in a process of its own; `before` is called there first."""
    child = os.fork()
    if child:
        return child
    log = os.open(said(out), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if before:
        before()
    os._exit(quantize.main([str(source), str(out), *FORMATS]))


def said(out: Path) -> Path:
    """Where the command's last words about this output go."""
    return out.with_name(out.name + ".log")


def finish(child: int) -> int:
    """Its exit status, or 128 and the signal."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def die_at(number: int, log: Path | None = None) -> Callable[[], None]:
    """Something for `start`: end the process just before the `number`th change to the disk. With a log, leave
    the process alone and write there how many there are."""

    def arm() -> None:
        count = 0

        def before(function: Callable[..., Any]) -> Callable[..., Any]:
            def guarded(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if log:
                    log.write_text(str(count))
                elif count == number:
                    os._exit(KILLED)
                return function(*args, **kwargs)

            return guarded

        os.replace, os.fsync, os.unlink = before(os.replace), before(os.fsync), before(os.unlink)
        Path.unlink = before(Path.unlink)  # type: ignore[method-assign]
        Writer.write = before(Writer.write)  # type: ignore[method-assign]

    return arm


def check_killed(out: Path, expected: dict[str, bytes]) -> None:
    """What a killed run leaves is no checkpoint, or a whole one."""
    if not (out / "config.json").is_file():
        try:
            open_checkpoint(out)
        except ModelError:
            return
        raise AssertionError(f"{out}: opens, and was killed")
    left = contents(out)
    left.pop(JOURNAL, None)
    assert left == expected, f"{out}: has a config.json, and is not whole"


def resume(source: Path, out: Path, expected: dict[str, bytes]) -> None:
    if (out / JOURNAL).exists() or not (out / "config.json").exists():  # else it was killed with all done
        assert finish(start(source, out)) == 0, said(out).read_text()
    found = contents(out)
    different = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    assert not different, f"{out}: {different} differ from those of an undisturbed run"


def at_writes(source: Path, folder: Path, expected: dict[str, bytes], points: int) -> None:
    log = folder / "count"
    assert finish(start(source, folder / "counted", die_at(0, log))) == 0
    total = int(log.read_text())
    for point in range(points):
        number = 1 + point * (total - 1) // max(points - 1, 1)
        out = folder / f"write-{number}"
        assert finish(start(source, out, die_at(number))) == KILLED
        check_killed(out, expected)
        resume(source, out, expected)
        print(f"killed before change {number} of {total} to the disk: the same in every byte", flush=True)


def at_random(source: Path, folder: Path, expected: dict[str, bytes], trials: int, seconds: float) -> None:
    chance = random.Random(0)
    kills = 0
    while kills < trials:
        out = folder / f"random-{kills}"
        moments: list[str] = []
        for _ in range(chance.randint(1, 3)):
            child = start(source, out)
            moment = chance.uniform(0, seconds)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            if finish(child) != 128 + signal.SIGKILL:
                break  # it was done before
            moments.append(f"{moment:.2f}")
            if out.exists():
                check_killed(out, expected)
        kills += len(moments)
        files = len(list(out.glob("*"))) if out.exists() else 0
        resume(source, out, expected)
        if moments:
            after = " and ".join(moments)
            print(f"killed after {after} s, with {files} files there: the same in every byte", flush=True)
        shutil.rmtree(out)
    print(f"{kills} kills of a run of {seconds:.2f} s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--writes", type=int, default=0, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    import hqq.core.optimize  # noqa: F401

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source"
        random_checkpoint(shape(2 if args.random else 1), source)
        begin = time.perf_counter()
        assert finish(start(source, folder / "undisturbed")) == 0
        seconds = time.perf_counter() - begin
        expected = contents(folder / "undisturbed")
        if args.writes:
            at_writes(source, folder, expected, args.writes)
        if args.random:
            at_random(source, folder, expected, args.random, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
