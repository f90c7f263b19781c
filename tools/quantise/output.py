"""The folder that `tools.quantize` writes: whose it is, what is done in it, and what it takes to finish.

`config.json` is written last and removed first, so that a folder with one in it is a whole checkpoint.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model.checkpoint.native import Shard
from model.checkpoint.safetensors import readable
from model.checkpoint.writer import encode_header, put_in_place
from model.config import NATIVE, read_json
from model.errors import ModelError
from runtime.errors import MixtralError
from tools.quantise import journal as journals
from tools.quantise.journal import Journal

CONFIG, INDEX, RECORD = "config.json", "model.safetensors.index.json", "quantization.json"
COPIED = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "tekken.json", "generation_config.json",
)  # fmt: skip
OTHER_FILES = 1 << 22  # bytes: index, record and configuration


def files_to_copy(source: Path) -> list[str]:
    """What goes along with the weights: the tokenizer, its chat template, and generation's settings."""
    found = {name for name in COPIED if (source / name).is_file()}
    found |= {path.name for path in source.glob("tokenizer.model.*") if path.is_file()}
    return sorted(name for name in found if not name.endswith(".part"))


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep it to this process; remove it again if nothing came into it."""
    if folder.exists() and not folder.is_dir():
        raise MixtralError(f"{folder}: a file; the output is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            yield
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process has; where the system cannot tell, trust that none has."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MixtralError(
                f"{folder}: another process is quantising into it; wait for its end"
            ) from error
        yield
    finally:
        os.close(handle)


def claim(folder: Path, settings: dict[str, object], files: list[str], force: bool) -> Journal:
    """The journal to go on with, or a new one. Nothing has been changed when this returns.

    Raises `MixtralError` for a folder that is not ours, and without `force` for one that holds a finished
    checkpoint or an unfinished one of other settings.
    """
    journal = Journal.read(folder)
    if journal is not None and journal.settings == settings:
        return journal
    if journal is not None and not force:
        raise MixtralError(
            f"{folder}: holds an unfinished run with {journals.difference(settings, journal.settings)}; "
            "repeat its command to finish it, or begin anew with --force"
        )
    if journal is not None:
        return Journal(settings, files, sorted({*journal.files, *journal.stale}), {})
    there = {path.name for path in folder.iterdir()} - {journals.NAME + ".part"}
    if not there:
        return Journal(settings, files, [], {})
    if not is_native(folder):
        raise MixtralError(f"{folder}: not empty, and not an output of this tool; choose another folder")
    if not force:
        raise MixtralError(
            f"{folder}: holds a finished checkpoint; choose another folder, or make it anew with --force"
        )
    return Journal(settings, files, [CONFIG, INDEX, RECORD, *journals.recorded_files(folder / RECORD)], {})


def is_native(folder: Path) -> bool:
    """Whether the folder's `config.json` is that of a native checkpoint, of whatever version."""
    try:
        section = read_json(folder / CONFIG).get("quantization_config")
    except ModelError:
        return False
    return isinstance(section, dict) and section.get("quant_method") == NATIVE


def is_finished(folder: Path, shard: Shard, metadata: dict[str, str]) -> bool:
    """Whether the shard is there with the header that it should have, and as long as that says."""
    path, header = folder / shard.name, encode_header(shard.tensors, metadata)
    if not path.is_file() or path.stat().st_size != shard_bytes(shard, metadata):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def shard_bytes(shard: Shard, metadata: dict[str, str]) -> int:
    """Size of the file."""
    return len(encode_header(shard.tensors, metadata)) + sum(tensor.bytes for tensor in shard.tensors)


def check_space(folder: Path, needed: int, removable: Iterable[Path]) -> None:
    """Raises `MixtralError` if `needed` bytes will not fit once the removable files are gone."""
    free = shutil.disk_usage(folder).free + sum(p.stat().st_size for p in removable if p.is_file())
    if needed + OTHER_FILES > free:
        raise MixtralError(
            f"{folder}: {readable(needed + OTHER_FILES)} are to be written and {readable(free)} are free; "
            "make room, choose another disk, or use fewer bits"
        )


def leftovers(folder: Path, journal: Journal, finished: Iterable[str]) -> list[Path]:
    """Files of this run and earlier ones that are not part of what is finished, `config.json` first."""
    names = [CONFIG, *sorted({*journal.files, *journal.stale} - {CONFIG, *finished})]
    return [folder / (name + ending) for name in names for ending in ("", ".part")]


def copy(source: Path, target: Path) -> None:
    """Copy a file so that it is there completely or not at all."""
    part = target.with_name(target.name + ".part")
    with source.open("rb") as read, part.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())
    put_in_place(part, target)
