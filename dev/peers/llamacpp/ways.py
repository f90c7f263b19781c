"""Ways of loading a model that are compared: our options, and llama.cpp's. Each is a process of its own."""

import argparse
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev.peers.llamacpp.sides import Side, our_side, their_side
from model.checkpoint.files import weight_files
from runtime.errors import OptionError
from runtime.options import EngineOptions


@dataclass(frozen=True)
class Way:
    """A name, the model's path, what `load` is given, and llama.cpp's interpreter; None for our side."""

    name: str
    path: Path
    given: Mapping[str, Any] = field(default_factory=dict)
    python: str | None = None

    @property
    def files(self) -> list[Path]:
        """The files of the weights."""
        return [self.path] if self.python else weight_files(self.path)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def start(self, prefix: Sequence[str] = ()) -> Side:
        """A process that has loaded nothing yet."""
        return their_side(self.python, prefix) if self.python else our_side(prefix)

    def load(self, side: Side, context: int, threads: int) -> dict[str, Any]:
        return side.ask("load", path=str(self.path), context=context, threads=threads, **self.given)


def mapped_and_read(folder: Path, **given: Any) -> list[Way]:
    """Our ways for a checkpoint: its files mapped, and read into memory."""
    if "map" not in {option.name for option in dataclasses.fields(EngineOptions)}:
        return [Way("read", folder, given)]
    return [Way("mapped", folder, given), Way("read", folder, {"map": False} | given)]


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gguf", type=Path, help="a model that llama.cpp loads beside ours")
    parser.add_argument("--python", help="the interpreter that has llama_cpp and gguf, for --gguf")


def peer_ways(args: argparse.Namespace) -> list[Way]:
    """llama.cpp's ways, if the command line names a model for it. Its default reorders weights for the CPU,
    which copies them into memory of its own."""
    if args.gguf is None:
        return []
    if args.python is None:
        raise OptionError("--gguf needs --python, the interpreter that has llama_cpp and gguf")
    return [
        Way("llama.cpp, mapped and reordered", args.gguf, {}, args.python),
        Way("llama.cpp, mapped", args.gguf, {"repack": False}, args.python),
    ]


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Ask the system to drop these files, so that the next read is from the disk or its own cache. It keeps
    what a process maps."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
