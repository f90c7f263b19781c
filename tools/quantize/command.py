"""Quantize a Mixtral checkpoint by HQQ. This takes the memory of a few tensors, however large the model.

    python -m tools.quantize path/to/Mixtral-8x7B-v0.1 OUT --attention 4 --experts 3g128
    python -m tools.quantize path/to/Mixtral-8x7B-v0.1 OUT --experts 2g64 --head 16 --json

A format is BITS or BITSgGROUP: 4, 3g128, 2g64, or 16 to leave weights as they are. After an interrupt or a
kill, the same command goes on from the last finished file. A summary of relative errors goes to stdout at the
end, progress to stderr.
"""

import argparse
import errno
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, open_checkpoint
from model.checkpoint.native import NativeFormat, Shard, StoredParameter, native_shards
from model.checkpoint.safetensors import readable
from model.checkpoint.writer import Writer, write_text
from model.config import ModelConfig, to_hf
from model.errors import ModelError
from model.quant.formats import DEFAULT, UNQUANTIZED, Formats
from model.quant.solve import quantize
from model.quant.spec import QuantSpec
from runtime.errors import DeviceError, MixtralError
from runtime.planning.device import pick_device
from runtime.process.shortage import shortage_as
from runtime.process.threads import pick_threads, using_threads
from runtime.shell.arguments import at_least_one, new_parser
from runtime.shell.command import put, run, say
from runtime.shell.progress import progress
from tools.quantize.journal import Journal, settings
from tools.quantize.names import CONFIG, INDEX, RECORD, files_to_copy, tokenizer_missing
from tools.quantize.output import (
    check_space,
    claim,
    copy,
    is_finished,
    leftovers,
    reserved,
    shard_bytes,
)

REMEDY = "free some, or use fewer --threads; the same command goes on from the last finished file"
Value = TypeVar("Value")
MATRICES = {
    "attention": "attention: 16, 8, 4, 3 or 2, or with a group size, like 3g128",
    "experts": "experts",
    "head": "the matrix that makes logits",
}


@dataclass(frozen=True)
class Job:
    """A checkpoint to quantize, how, and where to."""

    source: Checkpoint
    out: Path
    format: NativeFormat
    dtype: torch.dtype  # of tensors that are not quantized
    device: torch.device
    shards: list[Shard]
    copied: dict[str, Path]  # files that go along, by their name in the output

    @property
    def matrices(self) -> dict[str, list[str]]:
        """The quantized matrices of each shard, by the shard's name."""
        return {
            shard.name: [parameter.matrix for parameter in shard.parameters if parameter.spec.quantized]
            for shard in self.shards
        }

    @property
    def files(self) -> list[str]:
        """The names of all files of the output."""
        return [*(shard.name for shard in self.shards), INDEX, *self.copied, RECORD, CONFIG]

    def source_bytes(self, parameter: StoredParameter) -> int:
        return sum(piece.bytes for piece in self.source.layout.filling([parameter.name]))


def main(argv: list[str] | None = None) -> int:
    return run(
        lambda: convert(argv),
        interrupted="interrupted; the same command goes on from the last finished file",
    )


def convert(argv: list[str] | None) -> None:
    """Do what the command line asks. Every failure is raised."""
    args = make_parser().parse_args(argv)
    threads = pick_threads(args.threads)
    try:
        with shortage_as(DeviceError, REMEDY), using_threads(1):  # the pool's workers are the threads
            job = make_job(args)
            if not args.tokenizer and (missing := tokenizer_missing(args.source)):
                warnings.warn(missing, RuntimeWarning, stacklevel=2)
            errors = write_output(job, args.force, threads, args.quiet)
    except OSError as error:
        raise MixtralError(explain(error, args.out)) from error
    put((json.dumps(record(job, errors), indent=2) if args.json else summary(job, errors)) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("tools.quantize", __doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint folder, HF or Mistral layout")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, made if need be")
    spec, device = parsed_by(QuantSpec.parse), parsed_by(pick_device)
    for kind, default in DEFAULT.by_kind().items():
        help = f"of {MATRICES[kind]} (default: {default})"
        parser.add_argument(f"--{kind}", type=spec, metavar="FORMAT", help=help)
    parser.add_argument("--device", type=device, help="(default: the GPU if there is one, else cpu)")
    parser.add_argument(
        "--threads", type=at_least_one, metavar="N", help="(default: the processors it may use)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="take the tokenizer from this file or folder instead of SRC",
    )
    parser.add_argument("--force", action="store_true", help="replace an output of this tool that is in OUT")
    parser.add_argument("--json", action="store_true", help="print every matrix's error, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def parsed_by(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """The type of a flag whose value `parse` takes or refuses with a message."""

    def convert(text: str) -> Value:
        try:
            return parse(text)
        except (ModelError, MixtralError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def make_job(args: argparse.Namespace) -> Job:
    """The job, checked as far as possible without looking at the output. Raises `ModelError`, `MixtralError`
    or `TokenizerError`."""
    source, out, device = args.source, args.out, args.device or pick_device(None)
    checkpoint = open_checkpoint(source)
    if checkpoint.native:
        raise ModelError(f"{source}: quantized already ({checkpoint.description}); start from 16 bits")
    if out.exists() and out.samefile(source):
        raise MixtralError(f"{out}: source and output are the same folder")
    formats = pick_formats(args, checkpoint.config)
    format = NativeFormat(formats, source.resolve().name)
    dtype = checkpoint.dtype if checkpoint.dtype.itemsize == 2 else torch.bfloat16
    shards = native_shards(checkpoint.config, formats, dtype)
    return Job(checkpoint, out, format, dtype, device, shards, files_to_copy(source, args.tokenizer))


def pick_formats(args: argparse.Namespace, config: ModelConfig) -> Formats:
    """The formats that were asked for, or the default ones. Warns if the head does not take its default and
    stays at 16 bits, since a vocabulary can be of any size."""
    asked = {kind: getattr(args, kind) for kind in MATRICES if getattr(args, kind)}
    formats = replace(DEFAULT, **asked)
    if "head" not in asked:
        try:
            formats.head.check("lm_head", (config.vocab, config.hidden))
        except ModelError as error:
            reason = str(error).partition(";")[0]
            warnings.warn(f"{reason}; it stays at 16 bits", RuntimeWarning, stacklevel=2)
            return replace(formats, head=UNQUANTIZED)
    return formats


def write_output(job: Job, force: bool, threads: int, quiet: bool) -> dict[str, float]:
    """Write all files of the output that are missing. Returns the error of each quantized matrix by its name.

    Raises `MixtralError`, `ModelError` or `OSError`. Finished files stay, and a later call goes on from them.
    """
    folder, metadata, source = job.out, job.format.metadata(), job.source
    with reserved(folder):
        ours = settings(source.folder, source.config, job.format, job.device.type)
        journal = claim(folder, ours, job.files, job.matrices, force)
        by_name = {shard.name: shard for shard in job.shards}
        journal.shards = {
            name: errors
            for name, errors in journal.shards.items()
            if name in by_name and is_finished(folder, by_name[name], metadata)
        }
        missing = [shard for shard in job.shards if shard.name not in journal.shards]
        rest = leftovers(folder, journal, journal.shards)
        check_space(folder, sum(shard_bytes(shard, metadata) for shard in missing), rest)
        journal.save(folder)
        for path in rest:
            path.unlink(missing_ok=True)
        with byte_bar(job, missing, quiet) as advance, ThreadPoolExecutor(threads) as pool:
            for shard in missing:
                journal.shards[shard.name] = write_shard(job, shard, advance, pool)
                journal.save(folder)
        return finish(job, journal)


def write_shard(job: Job, shard: Shard, advance: Callable[[int], None], pool: Executor) -> dict[str, float]:
    """Write one file. Returns the errors of its quantized matrices."""
    errors = {}
    with Writer(job.out / shard.name, shard.tensors, job.format.metadata()) as writer:
        for parameter in shard.parameters:
            weight = read(job, parameter)
            if parameter.spec.quantized:
                made, error = quantize(weight, parameter.spec, parameter.matrix, pool)
                if not math.isfinite(error):
                    raise ModelError(f"{parameter.matrix}: has weights too large to quantize")
                errors[parameter.matrix] = error
                tensors = list(made.streams().values())
            else:
                tensors = [converted(parameter.name, weight, job.dtype)]
            for tensor, stored in zip(tensors, parameter.tensors, strict=True):
                writer.write(stored.name, tensor)
            advance(job.source_bytes(parameter))
    return errors


def converted(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype. Raises `ModelError` if any of it is not finite there."""
    made = weight.to(dtype)
    if torch.isfinite(made).all():
        return made
    if torch.isfinite(weight).all():
        raise ModelError(f"{name}: has weights too large for {str(dtype).removeprefix('torch.')}")
    raise ModelError(f"{name}: has weights that are not finite numbers; the source is damaged")


def read(job: Job, parameter: StoredParameter) -> Tensor:
    """One parameter of the source, in the source's dtype."""
    pieces = job.source.layout.filling([parameter.name])
    shape = job.source.layout.shapes[parameter.name]
    weight = torch.empty(shape, dtype=pieces[0].dtype, device=job.device)
    job.source.fill({parameter.name: weight})
    return weight


def finish(job: Job, journal: Journal) -> dict[str, float]:
    """Write the files other than weights, `config.json` last, and remove the journal."""
    tensors = [(tensor, shard.name) for shard in job.shards for tensor in shard.tensors]
    total = sum(tensor.bytes for tensor, _ in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {tensor.name: file for tensor, file in tensors}}
    errors = {name: error for shard in job.shards for name, error in journal.shards[shard.name].items()}
    write_json(job.out / INDEX, index)
    for name, path in job.copied.items():
        copy(path, job.out / name)
    write_json(job.out / RECORD, record(job, errors))
    config = to_hf(job.source.config, str(job.dtype).removeprefix("torch."))
    write_json(job.out / CONFIG, config | {"quantization_config": job.format.section()})
    journal.remove(job.out)
    return errors


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def record(job: Job, errors: dict[str, float]) -> dict[str, Any]:
    """The contents of `quantization.json`: settings, files, and the relative error of every matrix."""
    return {**job.format.section(), "device": job.device.type, "files": job.files, "errors": errors}


def summary(job: Job, errors: dict[str, float]) -> str:
    """A line for each kind of matrix, such as `experts.w13`: the mean error, and the worst one with its
    name."""
    kinds: dict[str, dict[str, float]] = {}
    for name, error in errors.items():
        kind = ".".join([part for part in name.split(".") if not part.isdecimal()][-2:])
        kinds.setdefault(kind, {})[name] = error
    lines = [f"{job.out}: {open_checkpoint(job.out).description}"]
    for kind, by_name in kinds.items():
        worst = max(by_name, key=by_name.__getitem__)
        mean = statistics.fmean(by_name.values())
        lines.append(
            f"{kind}: relative error {mean:.4f} on average, {by_name[worst]:.4f} at worst in {worst}"
        )
    return "\n".join(lines)


@contextmanager
def byte_bar(job: Job, missing: list[Shard], quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show how many of the source's bytes are done. Yields a function that takes each number of bytes."""
    parameters = [parameter for shard in missing for parameter in shard.parameters]
    done = job.source.bytes - sum(job.source_bytes(parameter) for parameter in parameters)
    if done and not quiet:
        say(f"going on after {readable(done)} of {readable(job.source.bytes)}")
    if quiet:
        yield lambda size: None
        return
    with progress(job.source.bytes, "quantizing", "", done, readable) as advance:
        yield advance


def explain(error: OSError, out: Path) -> str:
    """A system error in one line."""
    where = error.filename or out
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{where}: the disk is full; make room, and the same command goes on from the last finished file"
        )
    return f"{where}: {error.strerror or error}"
