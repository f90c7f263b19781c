"""What an unfinished run leaves beside its files, so that the same command can go on from there."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.files import weight_files
from model.checkpoint.native import NativeFormat
from model.checkpoint.writer import write_text
from model.config import ModelConfig, read_json, to_hf
from model.errors import ModelError
from runtime.errors import MixtralError

NAME = "quantize.journal.json"
SAMPLE = 1 << 16  # bytes of weights from the middle of each file


@dataclass
class Journal:
    """`settings` make the result what it is: a run goes on only under the same. `files` are all that the
    run will have written, and `stale` those of an earlier output, to be removed; both are plain names.
    `shards` are finished: {file: {matrix: relative error}}.
    """

    settings: dict[str, Any]
    files: list[str]
    stale: list[str]
    shards: dict[str, dict[str, float]]

    @staticmethod
    def read(folder: Path) -> "Journal | None":
        """The journal in `folder`, if there is one. Raises `MixtralError` if it is not one of ours."""
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            journal = Journal(found["settings"], found["files"], found["stale"], found["shards"])
            names = [*journal.files, *journal.stale, *journal.shards]
            if not isinstance(journal.settings, dict) or not all(is_plain(name) for name in names):
                raise ValueError("settings or names")
        except (ValueError, KeyError, TypeError) as error:
            raise MixtralError(f"{path}: damaged; remove the folder and begin again") from error
        return journal

    def save(self, folder: Path) -> None:
        write_text(folder / NAME, json.dumps(vars(self), indent=2) + "\n")

    def remove(self, folder: Path) -> None:
        (folder / NAME).unlink(missing_ok=True)


def is_plain(name: Any) -> bool:
    """Whether this names a file in the same folder, and nothing elsewhere.

    >>> [is_plain(name) for name in ("config.json", "../config.json", "/etc/passwd", "..", "", 3)]
    [True, False, False, False, False, False]
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def settings(source: Path, config: ModelConfig, native: NativeFormat, device: str) -> dict[str, Any]:
    """What decides about the bytes of the output."""
    return {**native.section(), "device": device, "source_files": fingerprint(source, config)}


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first setting that two runs do not share, in words."""
    for key, what in (
        ("source", "another source"),
        ("source_files", "other files of the source"),
        ("attention", "another --attention"),
        ("experts", "another --experts"),
        ("device", "another --device"),
    ):
        if ours.get(key) != theirs.get(key):
            return what
    return "another version of this program"


def fingerprint(folder: Path, config: ModelConfig) -> str:
    """A digest of the configuration, and of every weight file's name, size, header and middle."""
    digest = hashlib.sha256(json.dumps(to_hf(config)).encode())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(length))
            file.seek(max(8 + length, (8 + length + size) // 2 - SAMPLE // 2))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def recorded_files(path: Path) -> list[str]:
    """The files that a finished output says are its own."""
    try:
        files = read_json(path).get("files")
    except ModelError:  # nothing is known to be ours then
        return []
    return [name for name in files if is_plain(name)] if isinstance(files, list) else []
