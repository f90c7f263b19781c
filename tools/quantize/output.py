"""The folder that `tools.quantize` writes: whether it may, which files are finished, and how much room the
rest takes.

`config.json` is written last and removed first, so a folder that has one is a whole checkpoint.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from model.checkpoint.native import Shard
from model.checkpoint.safetensors import readable
from model.checkpoint.writer import encode_header, part_of, replacing
from model.config import NATIVE, read_json
from model.errors import ModelError
from runtime.errors import MixtralError
from tools.quantize import journal as journals
from tools.quantize import lock
from tools.quantize.journal import Journal
from tools.quantize.names import CONFIG, INDEX, RECORD

OTHER_FILES = 1 << 22  # bytes of index, record and configuration


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Make the folder if it is missing, and keep it to this process. Remove it at the end if it is empty."""
    if folder.exists() and not folder.is_dir():
        raise MixtralError(f"{folder}: a file; the output is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock.locked(folder):
            yield
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def claim(
    folder: Path,
    settings: dict[str, object],
    files: list[str],
    matrices: Mapping[str, Sequence[str]],
    force: bool,
) -> Journal:
    """The journal to go on with, or a new one. This changes nothing in the folder.

    `files` are all files of the output, and `matrices` the quantized matrices of each shard.

    Raises `MixtralError` for a folder that is not ours, and without `force` for one that holds a finished
    checkpoint or an unfinished one of other settings.
    """
    journal = Journal.read(folder)
    if journal is not None and journal.settings == settings:
        journal.check(folder, matrices)
        stale = {*journal.stale, *journal.files} - set(files)  # another tokenizer's, perhaps
        return Journal(settings, files, sorted(stale), journal.shards, journal.digests)
    if journal is not None and not force:
        raise MixtralError(
            f"{folder}: holds an unfinished run with {journals.difference(settings, journal.settings)}; "
            "repeat its command to finish it, or begin anew with --force"
        )
    if journal is not None:
        return Journal.begin(settings, files, sorted({*journal.files, *journal.stale}))
    there = {path.name for path in folder.iterdir()} - {journals.NAME + ".part", lock.NAME}
    if not there:
        return Journal.begin(settings, files, [])
    if not is_native(folder):
        raise MixtralError(f"{folder}: not empty, and not an output of this tool; choose another folder")
    if not force:
        raise MixtralError(
            f"{folder}: holds a finished checkpoint; choose another folder, or make it anew with --force"
        )
    leftover = [CONFIG, INDEX, RECORD, *journals.recorded_files(folder / RECORD)]
    return Journal.begin(settings, files, leftover)


def is_native(folder: Path) -> bool:
    """Whether the folder's `config.json` is that of a native checkpoint, of any version."""
    try:
        section = read_json(folder / CONFIG).get("quantization_config")
    except ModelError:
        return False
    return isinstance(section, dict) and section.get("quant_method") == NATIVE


def difference(path: Path, shard: Shard, metadata: dict[str, str]) -> str | None:
    """In which way a file has not the shard's size and header, in one line; None if it has."""
    size, header = shard_bytes(shard, metadata), encode_header(shard.tensors, metadata)
    if not path.is_file():
        return f"{path}: missing"
    if (found := path.stat().st_size) != size:
        return f"{path}: damaged, or of another checkpoint: {found} bytes, and {size} were written"
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return f"{path}: damaged, or of another checkpoint: its header is not the one that was written"
    return None


def shard_bytes(shard: Shard, metadata: dict[str, str]) -> int:
    """Bytes of the shard's file."""
    return len(encode_header(shard.tensors, metadata)) + sum(tensor.bytes for tensor in shard.tensors)


def check_space(folder: Path, needed: int, removable: Iterable[Path]) -> None:
    """Raises `MixtralError` if `needed` bytes do not fit the disk after the removable files are gone."""
    free = shutil.disk_usage(folder).free + sum(occupied(path) for path in removable if path.is_file())
    if needed + OTHER_FILES > free:
        raise MixtralError(
            f"{folder}: {readable(needed + OTHER_FILES)} are to be written and {readable(free)} are free; "
            "make room, choose another disk, or use fewer bits"
        )


def occupied(path: Path) -> int:
    """The bytes that a file takes of the disk. A sparse file takes less than its size."""
    about = path.stat()
    return min(about.st_size, 512 * about.st_blocks)


def leftovers(folder: Path, journal: Journal, finished: Iterable[str]) -> list[Path]:
    """Files of this run and of earlier ones, except finished ones; `config.json` comes first."""
    names = [CONFIG, *sorted({*journal.files, *journal.stale} - {CONFIG, *finished})]
    return [path for name in names for path in (folder / name, part_of(folder / name))]


def copy(source: Path, target: Path) -> None:
    """Copy a file completely or not at all. Raises `MixtralError` if the source ends early."""
    with source.open("rb") as read, replacing(target) as written:
        size = os.fstat(read.fileno()).st_size
        shutil.copyfileobj(read, written)
        if written.tell() != size:
            raise MixtralError(f"{source}: {size} bytes, and {written.tell()} could be read; did it change?")
