"""Compares the files of a quantized checkpoint with what `quantization.json` says of them."""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from model.checkpoint import open_checkpoint
from model.checkpoint.files import check_folder
from model.checkpoint.native import Shard, native_shards, read_format
from model.checkpoint.safetensors import readable
from model.config import ModelConfig, read_json
from model.errors import ModelError, quoted
from runtime.errors import MixtralError
from runtime.shell.progress import progress
from tools.quantize import journal
from tools.quantize.names import CONFIG, RECORD
from tools.quantize.output import difference, shard_bytes

CHUNK_BYTES = 16 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Verified:
    """What `verify` found: how many files there should be, a line for each that is missing or damaged, and
    whether their bytes could be compared."""

    files: int
    faults: list[str]
    compared: bool


def verify(folder: Path, quiet: bool) -> Verified:
    """Compare the header, size and SHA-256 of every weight file. Of other files, see that they are there.

    Earlier programs recorded no digests. Then no bytes are compared. Raises `ModelError` or `MixtralError` if
    the folder is not a checkpoint of this program, or if its configuration or index is damaged.
    """
    check_folder(folder)
    if (folder / journal.NAME).is_file() and not (folder / CONFIG).is_file():
        raise MixtralError(f"{folder}: holds an unfinished run; repeat its command to finish it")
    config, native = ModelConfig.read(folder), read_format(folder)
    if native is None:
        raise MixtralError(f"{folder}: not an output of this tool, so nothing is known of its files")
    metadata = native.metadata()
    shards = native_shards(config, native.formats, stored_dtype(folder), native.gates)
    recorded = {CONFIG, RECORD, *journal.recorded_files(folder / RECORD)}
    others = sorted(recorded - {shard.name for shard in shards})
    faults = [f"{folder / name}: missing" for name in others if not (folder / name).is_file()]
    digests: Mapping[str, str] | None = None
    if (folder / RECORD).is_file():
        try:
            digests = recorded_digests(folder / RECORD, shards)
        except ModelError as error:
            faults.append(str(error))
    with bar(sum(shard_bytes(shard, metadata) for shard in shards), quiet or not digests) as advance:
        for shard in shards:
            digest = digests[shard.name] if digests else None
            faults += filter(None, [fault(folder / shard.name, shard, metadata, digest, advance)])
    if not faults:
        open_checkpoint(folder)
    return Verified(len(shards) + len(others), faults, bool(digests))


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of tensors that are not quantized, as `config.json` states it. Gates may have another."""
    name = read_json(folder / CONFIG).get("torch_dtype")
    if name not in DTYPES:
        raise ModelError(f"{folder / CONFIG}: torch_dtype is {quoted(name)}, and must be one of {[*DTYPES]}")
    return DTYPES[name]


def recorded_digests(record: Path, shards: list[Shard]) -> Mapping[str, str] | None:
    """The SHA-256 of every shard; None if an earlier program wrote the record. Raises `ModelError` if it is
    damaged or that of other files."""
    found = read_json(record, journal.MAX_BYTES)
    if "sha256" not in found:
        return None
    digests = found["sha256"]
    if not journal.is_digests(digests) or digests.keys() != {shard.name for shard in shards}:
        raise ModelError(f"{record}: damaged, or of another checkpoint")
    return digests


def bar(total: int, quiet: bool) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda size: None) if quiet else progress(total, "verifying", "", 0, readable)


def fault(
    path: Path, shard: Shard, metadata: dict[str, str], digest: str | None, advance: Callable[[int], None]
) -> str | None:
    """What is wrong with a weight file, in one line."""
    try:
        if found := difference(path, shard, metadata):
            return found
        if digest is not None and sha256(path, advance) != digest:
            return f"{path}: damaged, or of another checkpoint: its bytes are not those that were written"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def sha256(path: Path, advance: Callable[[int], None]) -> str:
    """The SHA-256 of a file as the disk has it, in hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # what was written lately would come from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()
