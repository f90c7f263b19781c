"""Quantize a Mixtral checkpoint by HQQ. This takes the memory of a few tensors, however large the model.

    python -m tools.quantize path/to/Mixtral-8x7B-v0.1 OUT --attention 4 --experts 3g128
    python -m tools.quantize mistralai/Mixtral-8x7B-v0.1 OUT --experts 2g64 --head 16 --json
    python -m tools.quantize mixtral-8x7b-v0.1.Q5_K_M.gguf OUT
    python -m tools.quantize CHECKPOINT_OF_VERSION_1 OUT
    python -m tools.quantize --verify OUT

A format is BITS or BITSgGROUP: 4, 3g128, 2g64, or 16 to leave weights as they are. After an interrupt or a
kill, the same command goes on from the last finished file. A summary of relative errors goes to stdout at the
end, progress to stderr. A checkpoint that this program wrote in its version 1 is converted, with no format
given: every weight stays the same number. `--verify` compares every byte of a checkpoint with the digests
that were recorded when it was written.
"""

import argparse
import errno
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from model.checkpoint.files import weight_files
from model.checkpoint.native import NativeFormat, Shard, native_shards
from model.config import ModelConfig
from model.errors import ModelError
from model.quant.formats import DEFAULT, UNQUANTIZED, Formats
from model.quant.spec import QuantSpec
from runtime.errors import DeviceError, MixtralError
from runtime.hub.names import HubName
from runtime.hub.opening import find_settings
from runtime.planning.device import pick_device
from runtime.process.shortage import shortage_as
from runtime.process.threads import pick_threads, using_threads
from runtime.shell.arguments import at_least_one, new_parser
from runtime.shell.command import DONE, INTERRUPTED, one_line, put, run, say
from runtime.shell.progress import download_bar
from tools.quantize.job import Job, write_output
from tools.quantize.names import DOWNLOAD, RECORD, copied_from, files_to_copy, tokenizer_missing
from tools.quantize.sources.opening import open_model
from tools.quantize.sources.source import Extent, Source, sampled
from tools.quantize.summary import facts, summary
from tools.quantize.verify import verify
from tools.quantize.version1 import (
    from_version1,
    is_version1,
    open_version1,
    recorded_errors,
    stored_parameters,
)
from tools.quantize.weights import from_weights

REMEDY = "free some, or use fewer --threads; the same command goes on from the last finished file"
Value = TypeVar("Value")
MATRICES = {
    "attention": "attention: 16, 8, 4, 3 or 2, or with a group size, like 3g128",
    "experts": "experts",
    "head": "the matrix that makes logits",
}
OF_OUTPUTS = (*MATRICES, "device", "threads", "tokenizer", "force", "json")  # flags


def main(argv: list[str] | None = None) -> int:
    return run(
        lambda: convert(argv),
        interrupted="interrupted; the same command goes on from the last finished file",
    )


def convert(argv: list[str] | None) -> int | None:
    """Do what the command line asks. Returns an exit status, or None. Every failure is raised."""
    args = parse(argv)
    if args.out is None:
        return report(Path(args.source), args.quiet, put)
    threads = pick_threads(args.threads)
    try:
        with shortage_as(DeviceError, REMEDY), using_threads(1):  # the pool's workers are the threads
            job = make_job(args)
            record = write_output(job, args.force, threads, args.quiet)
    except OSError as error:
        raise MixtralError(explain(error, args.out)) from error
    put((json.dumps(record, indent=2) if args.json else summary(job, record)) + "\n")
    if args.verify:
        return report(args.out, args.quiet, to_stderr if args.json else put)
    return None


def report(folder: Path, quiet: bool, tell: Callable[[str], None]) -> int:
    """Verify a checkpoint, and tell what was found. Returns an exit status. Raises `MixtralError` unless all
    is well, and `ModelError` as `verify` does."""
    try:
        found = verify(folder, quiet)
    except KeyboardInterrupt:
        say(f"interrupted; {folder} has not been compared")
        return INTERRUPTED
    for line in found.faults:
        tell(one_line(line) + "\n")
    if found.faults:
        raise MixtralError(
            f"{folder}: {len(found.faults)} of {found.files} files are missing or damaged; make it again "
            "from its source with --force, or copy it again"
        )
    if not found.compared:
        raise MixtralError(
            f"{folder}: headers and sizes of its files are right, and their bytes cannot be compared: an "
            f"earlier version of this program wrote no digests to {RECORD}"
        )
    tell(f"{folder}: every byte of the weights is as it was written\n")
    return DONE


def to_stderr(text: str) -> None:
    say(text.removesuffix("\n"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Without OUT, SRC is the folder to verify."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.out is None and not args.verify:
        parser.error("the following arguments are required: OUT")
    if args.out is None and (given := [f"--{name}" for name in OF_OUTPUTS if getattr(args, name)]):
        parser.error(f"{' and '.join(given)} without OUT: --verify alone writes nothing")
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("tools.quantize", __doc__)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a checkpoint's folder, a GGUF file, or org/name or org/name@revision at the Hugging Face hub",
    )
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="folder to write, made if need be")
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
        metavar="PATH",
        help="take the tokenizer from this file, folder or model at the hub instead of SRC",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read OUT again after writing it, and compare every byte; without OUT, compare SRC",
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
    if HubName.parse(args.source) is None and is_version1(Path(args.source)):
        return conversion(args)
    bar = None if args.quiet else download_bar
    source, device = open_model(args.source, args.out, bar), args.device or pick_device(None)
    check_apart(source.files.folder, args.out)
    formats = pick_formats(args, source.config)
    gates = None if source.gates == source.dtype else source.gates
    shards = native_shards(source.config, formats, source.dtype, gates)
    return Job(
        what="quantizing",
        source=source.description,
        config=source.config,
        fingerprint=source.files.fingerprint(),
        out=args.out,
        format=NativeFormat(formats, source.files.name, gates),
        dtype=source.dtype,
        device=device.type,
        shards=shards,
        copied=pick_tokenizer(args, source.files.folder, own_tokenizer(source, args.tokenizer)),
        size=lambda parameter: source.size(parameter.name),
        make=partial(from_weights, source, device),
        bring=lambda shard: source.files.bring(extents(source, shard)),
        origin=source.files.origin,
        room=max(bytes_to_bring(source, args.out, shard) for shard in shards),
        facts=facts(source, shards),
    )


def extents(source: Source, shard: Shard) -> list[Extent]:
    """The bytes of the source that a file of the output is made from."""
    return [extent for parameter in shard.parameters for extent in source.extents(parameter.name)]


def bytes_to_bring(source: Source, out: Path, shard: Shard) -> int:
    """How many bytes `bring` puts into the output's folder for a file of the output."""
    return sum(stop - start for path, start, stop in extents(source, shard) if out / DOWNLOAD in path.parents)


def conversion(args: argparse.Namespace) -> Job:
    """The job that converts a checkpoint of version 1. Raises as `make_job` does."""
    source = Path(args.source)
    if given := [f"--{name}" for name in (*MATRICES, "device") if getattr(args, name)]:
        raise MixtralError(
            f"{source}: of version 1, which is converted as it is; leave out {' and '.join(given)}, "
            "or start from 16 bits"
        )
    checkpoint, format = open_version1(source)
    check_apart(source, args.out)
    shards = native_shards(checkpoint.config, format.formats, checkpoint.dtype)
    stored = {
        parameter.name: parameter for parameter in stored_parameters(checkpoint.config, checkpoint.formats)
    }
    matrices = {parameter.matrix for shard in shards for parameter in shard.parameters}
    return Job(
        what="converting",
        source=checkpoint.description,
        config=checkpoint.config,
        fingerprint=sampled(weight_files(source)),
        out=args.out,
        format=format,
        dtype=checkpoint.dtype,
        device="cpu",
        shards=shards,
        copied=pick_tokenizer(args, source, copied_from(source)),
        size=lambda parameter: sum(tensor.bytes for tensor in stored[parameter.name].tensors),
        make=partial(from_version1, checkpoint, {name: each.spec for name, each in stored.items()}),
        known=recorded_errors(source, matrices),
    )


def own_tokenizer(source: Source, other: str | None) -> Mapping[str, Path | bytes]:
    """The files of the source's tokenizer. One that cannot be read is no fault if there is an `other`."""
    try:
        return source.tokenizer
    except ModelError:
        if other is None:
            raise
        return {}


def pick_tokenizer(
    args: argparse.Namespace, folder: Path, found: Mapping[str, Path | bytes]
) -> dict[str, Path | bytes]:
    """The files that go along: those of `--tokenizer`, or else `found` in the source's folder. Warns if there
    is no tokenizer."""
    if args.tokenizer is None:
        if missing := tokenizer_missing(folder, found):
            warnings.warn(missing, RuntimeWarning, stacklevel=2)
        return files_to_copy(found)
    return files_to_copy(found, find_settings(args.tokenizer))


def check_apart(source: Path, out: Path) -> None:
    if out.exists() and out.samefile(source):
        raise MixtralError(f"{out}: source and output are the same folder")


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


def explain(error: OSError, out: Path) -> str:
    """A system error in one line."""
    where = error.filename or out
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{where}: the disk is full; make room, and the same command goes on from the last finished file"
        )
    return f"{where}: {error.strerror or error}"
