"""The pair of models that are compared: ours a native checkpoint, theirs a GGUF file, of the same shape."""

import argparse
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dev.peers.llamacpp.sides import Side
from model.quant.formats import DEFAULT
from model.shapes import SHAPES
from runtime.process.threads import usable_processors
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

QUANTS = ("q4_0", "q4_k", "q2_k", "q8_0")
HEADS = ("q6_k", "q4_0", "q8_0")
FOLDER = Path(tempfile.gettempdir()) / "mixtral-peers"


def add_side_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for all subcommands."""
    parser.add_argument("--python", required=True, help="the interpreter that has llama_cpp and gguf")
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b", help="(default: mixtral-8x7b)")
    parser.add_argument("--quant", choices=QUANTS, default=QUANTS[0], help="of theirs (default: q4_0)")
    parser.add_argument(
        "--threads", type=at_least_one, default=usable_processors(), help="(default: all processors)"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for what has whole models."""
    add_side_arguments(parser)
    parser.add_argument("--layers", type=at_least_one, default=4, help="(default: 4)")
    for kind, spec in DEFAULT.by_kind().items():
        parser.add_argument(
            f"--{kind}", metavar="FORMAT", default=str(spec), help=f"of ours (default: {spec})"
        )
    parser.add_argument(
        "--their-head", choices=HEADS, default=HEADS[0], help="(default: q6_k, as llama.cpp has it)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        help=f"where models are kept for later runs (default: {FOLDER})",
    )


@dataclass(frozen=True)
class Pair:
    """Where both models are, and what they are called."""

    native: Path  # a folder
    gguf: Path
    ours: str
    theirs: str


def make_pair(ours: Side, theirs: Side, args: argparse.Namespace) -> Pair:
    """Make the models that the command line describes, where they are missing."""
    shape = asdict(replace(SHAPES[args.shape], layers=args.layers))
    formats = {kind: getattr(args, kind) for kind in DEFAULT.by_kind()}
    trunk = "q4_k" if args.quant == "q2_k" else args.quant  # attention and embeddings
    name = f"{args.shape}-{args.layers}"
    native = args.folder / "-".join([name, *(f"{kind}-{spec}" for kind, spec in formats.items())])
    gguf = args.folder / f"{name}-{args.quant}-head-{args.their_head}.gguf"
    args.folder.mkdir(parents=True, exist_ok=True)
    say(f"models in {args.folder}")
    ours.ask("write", folder=str(native), shape=shape, formats=formats)
    if not gguf.exists():
        kinds = {"quant": args.quant, "trunk": trunk, "head": args.their_head}
        theirs.ask("write", path=str(gguf), shape=shape, **kinds)
    specs = ", ".join(f"{kind} {spec}" for kind, spec in formats.items())
    return Pair(native, gguf, specs, f"attention {trunk}, experts {args.quant}, head {args.their_head}")
