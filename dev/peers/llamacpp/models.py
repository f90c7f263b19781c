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


def add_model_arguments(parser: argparse.ArgumentParser, layers: int = 4) -> None:
    """Flags for what has whole models, which have that many layers by default."""
    add_side_arguments(parser)
    parser.add_argument("--layers", type=at_least_one, default=layers, help=f"(default: {layers})")
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


def name_pair(args: argparse.Namespace) -> Pair:
    """The models that the command line describes, made or not."""
    formats = {kind: getattr(args, kind) for kind in DEFAULT.by_kind()}
    name = f"{args.shape}-{args.layers}"
    specs = ", ".join(f"{kind} {spec}" for kind, spec in formats.items())
    return Pair(
        args.folder / "-".join([name, *(f"{kind}-{spec}" for kind, spec in formats.items())]),
        args.folder / f"{name}-{args.quant}-head-{args.their_head}.gguf",
        specs,
        f"attention {trunk(args.quant)}, experts {args.quant}, head {args.their_head}",
    )


def trunk(quant: str) -> str:
    """The format of attention and embeddings beside experts in the format `quant`."""
    return "q4_k" if quant == "q2_k" else quant


def make_pair(ours: Side, theirs: Side, args: argparse.Namespace) -> Pair:
    """Make the models that the command line describes, where they are missing."""
    pair = name_pair(args)
    shape = asdict(replace(SHAPES[args.shape], layers=args.layers))
    formats = {kind: getattr(args, kind) for kind in DEFAULT.by_kind()}
    args.folder.mkdir(parents=True, exist_ok=True)
    say(f"models in {args.folder}")
    ours.ask("write", folder=str(pair.native), shape=shape, formats=formats)
    if not pair.gguf.exists():
        kinds = {"quant": args.quant, "trunk": trunk(args.quant), "head": args.their_head}
        theirs.ask("write", path=str(pair.gguf), shape=shape, **kinds)
    return pair
