"""Size against quality: how well a model in many formats predicts text that it has not seen.

`tools.quantize` writes every combination of formats into a temporary folder, from which it is loaded and
judged in float32, so that only the weights differ. The text is the part of Python's standard library that the
demo was not trained on (`dev.demo.corpus`). Sizes are of the tensors as stored.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dev.bench.quality_plot import import_matplotlib, plot
from dev.bench.quality_table import Result, all_formats, frontier, markdown, parse_formats, short
from dev.demo.corpus import standard_library
from model.checkpoint import open_checkpoint
from model.quant.formats import Formats
from model.quant.size import expert_bits
from runtime.engine import DEMO, Engine
from runtime.errors import MixtralError, OptionError
from runtime.options import EngineOptions
from runtime.process.threads import pick_threads
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from tools.perplexity import Score, score
from tools.quantize import command as quantize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, nargs="?", default=DEMO, help="checkpoint folder to quantize (default: the demo)"
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        metavar="A/E[/H]",
        help="of attention, experts and head (default: 21 pairs, with the head at 16 bits)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="judge each in bfloat16, too, and show the change; on a CPU that rounds activations to 8 bits",
    )
    parser.add_argument("--threads", type=at_least_one, metavar="N", help="(default: as an engine has)")
    parser.add_argument("--bytes", type=int, metavar="N", help="of the text, the first N (default: all)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw size against perplexity")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to a file as well")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all, with a line for each on stderr. Writes the plot and the tables if asked."""
    wanted = [parse_formats(text) for text in args.formats] if args.formats else all_formats()
    if args.bytes is not None and args.bytes < 1:
        raise OptionError(f"--bytes is {args.bytes}, and must be at least 1")
    if args.plot:
        import_matplotlib()  # so that it fails before anything is measured
    held_out = [text for text in standard_library().held_out if text]  # of an empty file nothing is predicted
    texts = first_bytes(held_out, args.bytes)
    results = measure(args.model, wanted, texts, args.fast)
    tables = markdown(results)
    if args.markdown:
        args.markdown.write_text(tables + "\n")
    if args.plot:
        plot(results, args.plot)
    return {
        "checkpoint": str(args.model),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "results": [one.as_dict() for one in results],
        "frontier": [short(one.formats) for one in frontier(results)],
        "tables": tables,
    }


def as_text(report: dict[str, Any]) -> str:
    """The tables, ready for a document, and what they were measured on."""
    seconds = sum(result["score"]["seconds"] for result in report["results"])
    return (
        f"{report['tables']}\n\n{report['checkpoint']} on {report['text_bytes']:,} bytes of text in float32, "
        f"{seconds:,.0f} s on {report['machine']['cpu']}, torch {report['machine']['torch']}"
    )


def first_bytes(texts: Sequence[str], limit: int | None) -> list[str]:
    """The first texts, up to `limit` bytes of UTF-8 in all. The last one is cut between characters.

    >>> first_bytes(["one", "tw\u00f6", "three"], 6), first_bytes(["one"], None)
    (['one', 'tw'], ['one'])
    """
    if limit is None:
        return list(texts)
    taken = []
    for text in texts:
        cut = text.encode()[:limit]
        limit -= len(cut)
        if part := cut.decode(errors="ignore"):
            taken.append(part)
    return taken


def measure(
    source: Path, wanted: Sequence[Formats], texts: Sequence[str], fast: bool = False
) -> list[Result]:
    """Write, load and judge each combination. Only one at a time is on the disk."""
    results = []
    for number, formats in enumerate(wanted, start=1):
        with tempfile.TemporaryDirectory(prefix="quality-") as folder:
            out = Path(folder) / "quantized"
            write(source, out, formats)
            results.append(judge(out, formats, texts, fast))
        size, total = results[-1].bytes / 1e6, results[-1].score
        say(
            f"{number} of {len(wanted)}: {short(formats)}, {size:.2f} MB, perplexity {total.perplexity:.4f}, "
            f"{total.bits_per_byte:.4f} bits per byte, {total.seconds:.0f} s"
        )
    return results


def write(source: Path, out: Path, formats: Formats) -> None:
    """Quantize by the command. Raises `MixtralError` if it fails, after it has said why on stderr."""
    widths = [word for kind, spec in formats.by_kind().items() for word in (f"--{kind}", str(spec))]
    with contextlib.redirect_stdout(io.StringIO()):
        status = quantize.main([str(source), str(out), *widths, "--quiet"])
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise MixtralError(f"{source} cannot be quantized to {short(formats)}; leave that out of --formats")


def judge(folder: Path, formats: Formats, texts: Sequence[str], fast: bool = False) -> Result:
    """How well the checkpoint predicts texts, in float32 and if asked by the fast product."""
    checkpoint = open_checkpoint(folder)
    bits = expert_bits(checkpoint.config, formats.experts)
    exact = score_in("float32", folder, texts)
    return Result(
        formats, checkpoint.bytes, bits, exact, score_in("bfloat16", folder, texts) if fast else None
    )


def score_in(dtype: str, folder: Path, texts: Iterable[str]) -> Score:
    """How well the checkpoint predicts texts, each after a begin id, with half a context or more in view."""
    with Engine.load(folder, EngineOptions(dtype=dtype, threads=pick_threads())) as engine:
        window = engine.plan.context
        return sum((score(engine, text, window, window // 2) for text in texts), Score())
