"""The journal of an unfinished run, kept beside its files so that the same command can go on from there."""

import hashlib
import json
import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from model.checkpoint.native import NativeFormat
from model.checkpoint.writer import write_text
from model.config import ModelConfig, read_json, to_hf
from model.errors import ModelError
from runtime.errors import MixtralError
from tools.quantize.names import is_ours

NAME = "quantize.journal.json"
MAX_BYTES = 64 << 20

Errors = dict[str, float]  # relative error of every matrix


@dataclass
class Journal:
    """`settings` decide the bytes of the output, so a run goes on only with the same ones. `files` are all
    files of the output, and `stale` those of an earlier output, which are to be removed. `shards` are the
    finished files, {file: {matrix: relative error}}, and `digests` are their SHA-256, {file: hex}.
    """

    settings: dict[str, Any]
    files: list[str]
    stale: list[str]
    shards: dict[str, Errors]
    digests: dict[str, str]

    @staticmethod
    def begin(settings: dict[str, Any], files: list[str], stale: list[str]) -> "Journal":
        """The journal of a run that has finished no file."""
        return Journal(settings, files, stale, {}, {})

    @staticmethod
    def read(folder: Path) -> "Journal | None":
        """The journal in `folder`, or None. Raises `MixtralError` if its contents are not a journal's."""
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            return parse(read_json(path, MAX_BYTES))
        except ValueError as error:  # `ModelError` is one
            raise damaged(folder) from error

    def check(self, folder: Path, matrices: Mapping[str, Sequence[str]]) -> None:
        """Check the finished shards against all shards of the run, {file: matrices}. Raises `MixtralError`
        for one that is unknown, or lacks its digest or the error of a matrix."""
        if self.shards.keys() != self.digests.keys():
            raise damaged(folder)
        for name, errors in self.shards.items():
            if name not in matrices or sorted(errors) != sorted(matrices[name]):
                raise damaged(folder)

    def keep(self, names: Container[str]) -> None:
        """Forget the finished shards that are not among `names`."""
        self.shards = {name: errors for name, errors in self.shards.items() if name in names}
        self.digests = {name: digest for name, digest in self.digests.items() if name in names}

    def save(self, folder: Path) -> None:
        write_text(folder / NAME, json.dumps(vars(self), indent=2) + "\n")

    def remove(self, folder: Path) -> None:
        (folder / NAME).unlink(missing_ok=True)


def parse(found: dict[str, Any]) -> Journal:
    """A journal from the contents of its file. Raises `ValueError` if any part is not as we write it."""
    found = {"digests": {}} | found  # the journals of version 1 have none
    if found.keys() != {"settings", "files", "stale", "shards", "digests"}:
        raise ValueError("keys")
    journal = Journal(**found)
    if not isinstance(journal.settings, dict) or not isinstance(journal.shards, dict):
        raise ValueError("settings or shards")
    for names in (journal.files, journal.stale, list(journal.shards)):
        if not isinstance(names, list) or not all(map(is_ours, names)):
            raise ValueError("names")
    if not all(map(is_errors, journal.shards.values())):
        raise ValueError("errors")
    if not is_digests(journal.digests):
        raise ValueError("digests")
    return journal


def is_errors(value: object) -> TypeGuard[Errors]:
    """
    >>> [is_errors(value) for value in ({"o_proj": 0.01}, {"o_proj": math.nan}, {"o_proj": 1}, [])]
    [True, False, False, False]
    """
    return isinstance(value, dict) and all(
        isinstance(error, float) and 0 <= error < math.inf for error in value.values()
    )


def is_digests(value: object) -> bool:
    """
    >>> [is_digests(value) for value in ({"a": "0f" * 32}, {"a": "0F" * 32}, {"a": "0f"}, {"a": 3}, [])]
    [True, False, False, False, False]
    """
    return isinstance(value, dict) and all(
        isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in value.values()
    )


def damaged(folder: Path) -> MixtralError:
    return MixtralError(f"{folder / NAME}: damaged; remove the folder and begin again")


def settings(
    config: ModelConfig, native: NativeFormat, device: str, fingerprint: str, origin: str = ""
) -> dict[str, Any]:
    """What decides the bytes of the output. `fingerprint` is that of the source's files, and `origin` says
    where they are if that is the hub."""
    source = hashlib.sha256(f"{json.dumps(to_hf(config))}{fingerprint}".encode()).hexdigest()
    at = {"origin": origin} if origin else {}
    return {**native.section(), "device": device, "source_files": source, **at}


def begun_at(folder: Path, name: str) -> str | None:
    """The commit that an unfinished run in `folder` found for this name at the hub; None if there is no such
    run."""
    try:
        journal = Journal.read(folder)
    except MixtralError:  # which is said later
        return None
    asked, _, commit = str(journal.settings.get("origin", "")).rpartition(" at ") if journal else ("", "", "")
    return commit if asked == name else None


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first setting in which two runs differ, in words."""
    for key, what in (
        ("version", "another version of this program"),
        ("source", "another source"),
        ("origin", "another revision of the source"),
        ("source_files", "other files of the source"),
        ("attention", "another --attention"),
        ("experts", "another --experts"),
        ("head", "another --head"),
        ("device", "another --device"),
    ):
        if ours.get(key) != theirs.get(key):
            return what
    return "another version of this program"


def recorded_files(path: Path) -> list[str]:
    """The files that a finished output records as its own, as far as this program writes such names."""
    try:
        files = read_json(path, MAX_BYTES).get("files")
    except ModelError:  # then no file is known to be ours
        return []
    return [name for name in files if is_ours(name)] if isinstance(files, list) else []
