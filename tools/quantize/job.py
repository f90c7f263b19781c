"""Writes a checkpoint file by file, so that a run that was broken off goes on from the last finished file."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.native import NativeFormat, Shard, StoredParameter
from model.checkpoint.safetensors import readable
from model.checkpoint.writer import Writer, write_bytes, write_text
from model.config import ModelConfig, to_hf
from runtime.shell.command import say
from runtime.shell.progress import progress
from tools.quantize.journal import Errors, Journal, settings
from tools.quantize.names import CONFIG, DOWNLOAD, INDEX, RECORD
from tools.quantize.output import (
    check_space,
    claim,
    copy,
    difference,
    leftovers,
    reserved,
    shard_bytes,
)

Make = Callable[[StoredParameter, Executor], tuple[list[Tensor], float | None]]


@dataclass(frozen=True)
class Job:
    """A checkpoint to make, from what, and how.

    fingerprint  of the files that it is made from
    copied       files that go along, or their contents, by their name in the output
    size         gives the bytes of the source that a parameter is made from
    make         gives a parameter's tensors as they are to be written, and the error of quantizing it if that
                 is done now
    bring        puts in place what `make` reads for a shard
    origin       of the source, if it is at the hub: `org/name@revision at COMMIT`
    room         bytes that the disk needs besides those of the output
    known        errors of matrices that were quantized before
    facts        further entries of the record
    """

    what: str  # is done, as progress names it
    source: str  # in words
    config: ModelConfig
    fingerprint: str
    out: Path
    format: NativeFormat
    dtype: torch.dtype  # of tensors that are not quantized
    device: str  # the type of the device that computes
    shards: list[Shard]
    copied: Mapping[str, Path | bytes]
    size: Callable[[StoredParameter], int]
    make: Make
    bring: Callable[[Shard], None] = lambda shard: None
    origin: str = ""
    room: int = 0
    known: Errors | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matrices(self) -> dict[str, list[str]]:
        """The matrices of each shard that are quantized now, by the shard's name."""
        return {
            shard.name: [p.matrix for p in shard.parameters if p.spec.quantized and self.known is None]
            for shard in self.shards
        }

    @property
    def files(self) -> list[str]:
        """The names of all files of the output."""
        return [*(shard.name for shard in self.shards), INDEX, *self.copied, RECORD, CONFIG]

    def source_bytes(self, shards: Sequence[Shard]) -> int:
        """The bytes of the source that these shards are made from."""
        return sum(self.size(parameter) for shard in shards for parameter in shard.parameters)


def write_output(job: Job, force: bool, threads: int, quiet: bool) -> dict[str, Any]:
    """Write all files of the output that are missing. Returns the contents of `quantization.json`.

    Raises `MixtralError`, `ModelError` or `OSError`. Finished files stay, and a later call goes on from them.
    """
    folder, metadata = job.out, job.format.metadata()
    with reserved(folder):
        ours = settings(job.config, job.format, job.device, job.fingerprint, job.origin)
        journal = claim(folder, ours, job.files, job.matrices, force)
        journal.keep({s.name for s in job.shards if not difference(folder / s.name, s, metadata)})
        missing = [shard for shard in job.shards if shard.name not in journal.shards]
        rest = leftovers(folder, journal, journal.shards)
        needed = sum(shard_bytes(shard, metadata) for shard in missing) + job.room
        check_space(folder, needed, [*rest, *(folder / DOWNLOAD).rglob("*")])
        journal.save(folder)
        for path in rest:
            path.unlink(missing_ok=True)
        with byte_bar(job, missing, quiet) as advance, ThreadPoolExecutor(threads) as pool:
            for shard in missing:
                job.bring(shard)
                errors, digest = write_shard(job, shard, advance, pool)
                journal.shards[shard.name], journal.digests[shard.name] = errors, digest
                journal.save(folder)
        return finish(job, journal)


def write_shard(job: Job, shard: Shard, advance: Callable[[int], None], pool: Executor) -> tuple[Errors, str]:
    """Write one file. Returns the errors of its matrices that are quantized now, and the file's SHA-256."""
    errors, digest = {}, hashlib.sha256()
    with Writer(job.out / shard.name, shard.tensors, job.format.metadata(), digest.update) as writer:
        for parameter in shard.parameters:
            tensors, error = job.make(parameter, pool)
            if error is not None:
                errors[parameter.matrix] = error
            for tensor, stored in zip(tensors, parameter.tensors, strict=True):
                writer.write(stored.name, tensor)
            advance(job.size(parameter))
    return errors, digest.hexdigest()


def finish(job: Job, journal: Journal) -> dict[str, Any]:
    """Write the files other than weights, `config.json` last, and remove the journal. Returns the record."""
    shutil.rmtree(job.out / DOWNLOAD, ignore_errors=True)
    tensors = [(tensor, shard.name) for shard in job.shards for tensor in shard.tensors]
    total = sum(tensor.bytes for tensor, _ in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {tensor.name: file for tensor, file in tensors}}
    write_json(job.out / INDEX, index)
    for name, contents in job.copied.items():
        if isinstance(contents, Path):
            copy(contents, job.out / name)
        else:
            write_bytes(job.out / name, contents)
    found = record(job, journal)
    write_json(job.out / RECORD, found)
    config = to_hf(job.config, str(job.dtype).removeprefix("torch."))
    write_json(job.out / CONFIG, config | {"quantization_config": job.format.section()})
    journal.remove(job.out)
    return found


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def record(job: Job, journal: Journal) -> dict[str, Any]:
    """The contents of `quantization.json`: settings, files, the SHA-256 of those with weights, and the
    relative error of every matrix for which it is known."""
    names = [shard.name for shard in job.shards]
    errors = {matrix: error for name in names for matrix, error in journal.shards[name].items()}
    return {
        **job.format.section(),
        "device": job.device,
        "files": job.files,
        "sha256": {name: journal.digests[name] for name in names},
        **job.facts,
        "errors": errors if job.known is None else job.known,
    }


@contextmanager
def byte_bar(job: Job, missing: list[Shard], quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show how many of the source's bytes are done. Yields a function that takes each number of bytes."""
    total = job.source_bytes(job.shards)
    done = total - job.source_bytes(missing)
    if done and not quiet:
        say(f"going on after {readable(done)} of {readable(total)}")
    if quiet:
        yield lambda size: None
        return
    with progress(total, job.what, "", done, readable) as advance:
        yield advance
