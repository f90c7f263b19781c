"""Quantize a Mixtral checkpoint by HQQ. This takes the memory of a few tensors, however large the model.

    python -m tools.quantize path/to/Mixtral-8x7B-v0.1 OUT --attention 4 --experts 3g128
    python -m tools.quantize path/to/Mixtral-8x7B-v0.1 OUT --experts 2g64 --head 16 --json
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
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from model.checkpoint import open_checkpoint
from model.checkpoint.native import NativeFormat, native_shards
from model.config import ModelConfig
from model.errors import ModelError
from model.quant.formats import DEFAULT, UNQUANTIZED, Formats
from model.quant.spec import QuantSpec
from runtime.errors import DeviceError, MixtralError
from runtime.planning.device import pick_device
from runtime.process.shortage import shortage_as
from runtime.process.threads import pick_threads, using_threads
from runtime.shell.arguments import at_least_one, new_parser
from runtime.shell.command import DONE, INTERRUPTED, one_line, put, run, say
from tools.quantize.job import Job, write_output
from tools.quantize.journal import Errors
from tools.quantize.names import RECORD, files_to_copy, tokenizer_missing
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
        return report(args.source, args.quiet, put)
    threads = pick_threads(args.threads)
    try:
        with shortage_as(DeviceError, REMEDY), using_threads(1):  # the pool's workers are the threads
            job = make_job(args)
            if not args.tokenizer and (missing := tokenizer_missing(args.source)):
                warnings.warn(missing, RuntimeWarning, stacklevel=2)
            record = write_output(job, args.force, threads, args.quiet)
    except OSError as error:
        raise MixtralError(explain(error, args.out)) from error
    put((json.dumps(record, indent=2) if args.json else summary(job.out, record["errors"])) + "\n")
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
        type=Path,
        metavar="SRC",
        help="checkpoint folder, HF or Mistral layout, or one of version 1",
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
        type=Path,
        metavar="PATH",
        help="take the tokenizer from this file or folder instead of SRC",
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
    if is_version1(args.source):
        return conversion(args)
    source, out, device = args.source, args.out, args.device or pick_device(None)
    checkpoint = open_checkpoint(source)
    if checkpoint.native:
        raise ModelError(f"{source}: quantized already ({checkpoint.description}); start from 16 bits")
    check_apart(source, out)
    formats = pick_formats(args, checkpoint.config)
    format = NativeFormat(formats, source.resolve().name)
    dtype = checkpoint.dtype if checkpoint.dtype.itemsize == 2 else torch.bfloat16
    shards = native_shards(checkpoint.config, formats, dtype)
    copied = files_to_copy(source, args.tokenizer)
    make = partial(from_weights, checkpoint, dtype, device)
    return Job("quantizing", checkpoint, out, format, dtype, device.type, shards, copied, make)


def conversion(args: argparse.Namespace) -> Job:
    """The job that converts a checkpoint of version 1. Raises as `make_job` does."""
    source, out = args.source, args.out
    if given := [f"--{name}" for name in (*MATRICES, "device") if getattr(args, name)]:
        raise MixtralError(
            f"{source}: of version 1, which is converted as it is; leave out {' and '.join(given)}, "
            "or start from 16 bits"
        )
    checkpoint, format = open_version1(source)
    check_apart(source, out)
    shards = native_shards(checkpoint.config, format.formats, checkpoint.dtype)
    copied = files_to_copy(source, args.tokenizer)
    specs = {stored.name: stored.spec for stored in stored_parameters(checkpoint.config, checkpoint.formats)}
    matrices = {parameter.matrix for shard in shards for parameter in shard.parameters}
    make, known = partial(from_version1, checkpoint, specs), recorded_errors(source, matrices)
    dtype = checkpoint.dtype
    return Job("converting", checkpoint, out, format, dtype, "cpu", shards, copied, make, known)


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


def summary(out: Path, errors: Errors) -> str:
    """A line for each kind of matrix, such as `experts.w13`: the mean error, and the worst one with its
    name."""
    kinds: dict[str, dict[str, float]] = {}
    for name, error in errors.items():
        kind = ".".join([part for part in name.split(".") if not part.isdecimal()][-2:])
        kinds.setdefault(kind, {})[name] = error
    lines = [f"{out}: {open_checkpoint(out).description}"]
    for kind, by_name in kinds.items():
        worst = max(by_name, key=by_name.__getitem__)
        mean = statistics.fmean(by_name.values())
        lines.append(
            f"{kind}: relative error {mean:.4f} on average, {by_name[worst]:.4f} at worst in {worst}"
        )
    return "\n".join(lines)


def explain(error: OSError, out: Path) -> str:
    """A system error in one line."""
    where = error.filename or out
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{where}: the disk is full; make room, and the same command goes on from the last finished file"
        )
    return f"{where}: {error.strerror or error}"
