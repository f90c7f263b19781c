"""Size against quality: how well a model in many formats predicts text that it has not seen.

`tools.quantize` writes every combination of formats into a temporary folder, from which it is loaded and
judged in float32, so that only the weights differ. The text is the part of Python's standard library that the
demo was not trained on (`dev.demo.corpus`). Sizes are of the tensors as stored.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dev.demo.corpus import standard_library
from model.checkpoint import open_checkpoint
from model.errors import ModelError
from model.quant.formats import Formats
from model.quant.size import expert_bits
from model.quant.spec import QuantSpec
from runtime.engine import DEMO, Engine
from runtime.errors import MixtralError, OptionError
from runtime.options import EngineOptions
from runtime.process.threads import pick_threads
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from tools.perplexity import Score, score
from tools.quantize import command as quantize

WIDTHS = ("16", "4", "3", "2")
EXPERTS = ("8", "4", "4g128", "3", "3g128", "2", "2g32", "2g64")  # with attention at 4
COLORS = {16: "#1b1b1b", 8: "#7f4fa8", 4: "#1f6fb4", 3: "#d9730d", 2: "#b3282d"}  # by bits of attention


def parse_formats(text: str) -> Formats:
    """Formats written attention/experts, with the head at 16 bits, or attention/experts/head.

    >>> print(parse_formats("4g64/3g128"), parse_formats("4/3g128/8"), sep="; ")
    attention 4, experts 3g128, head 16; attention 4, experts 3g128, head 8
    """
    parts = text.split("/")
    if len(parts) not in (2, 3):
        raise ModelError(
            f"{text!r} is not a pair of formats: write attention/experts, as in 4/3g128, or "
            "attention/experts/head"
        )
    return Formats(*map(QuantSpec.parse, parts))


def short(formats: Formats) -> str:
    """
    >>> [short(parse_formats(text)) for text in ("4g64/3g128/16", "4/3g128/8g64")]
    ['4/3g128', '4/3g128/8']
    """
    parts = [formats.attention, formats.experts, *[formats.head] * formats.head.quantized]
    return "/".join(map(str, parts))


@dataclasses.dataclass(frozen=True)
class Result:
    """One combination: the bytes of its tensors, the bits of an expert's weight, and its score."""

    formats: Formats
    bytes: int
    expert_bits: float
    score: Score  # in float32
    fast: Score | None = None  # in bfloat16, by the device's fast product

    def better(self, other: "Result") -> bool:
        """Whether this is smaller or predicts better than another, and is no worse in the other respect."""
        mine, others = (self.bytes, self.score.perplexity), (other.bytes, other.score.perplexity)
        return mine != others and mine[0] <= others[0] and mine[1] <= others[1]

    def as_dict(self) -> dict[str, Any]:
        formats = {kind: str(spec) for kind, spec in self.formats.by_kind().items()}
        sizes = {"bytes": self.bytes, "expert_bits": self.expert_bits}
        fast = {"fast": self.fast.as_dict()} if self.fast else {}
        return formats | sizes | {"score": self.score.as_dict()} | fast


def all_formats() -> list[Formats]:
    """The default formats: every pair of widths, then more formats of experts.

    >>> [short(formats) for formats in all_formats()][14:]
    ['2/3', '2/2', '4/8', '4/4g128', '4/3g128', '4/2g32', '4/2g64']
    """
    pairs = [*itertools.product(WIDTHS, WIDTHS), *(("4", experts) for experts in EXPERTS)]
    return list(dict.fromkeys(parse_formats("/".join(pair)) for pair in pairs))


def frontier(results: Iterable[Result]) -> list[Result]:
    """The results that no other is better than, smallest first.

    >>> def result(formats, size, nats):
    ...     return Result(parse_formats(formats), size, 4.0, Score(nats, tokens=1, bytes=1))
    >>> results = [result("4/4", 50, 1.1), result("4/2", 30, 1.9), result("3/4", 51, 1.2)]
    >>> [short(one.formats) for one in frontier(results)]
    ['4/2', '4/4']
    """
    results = list(results)
    best = [one for one in results if not any(other.better(one) for other in results)]
    return sorted(best, key=lambda one: one.bytes)


def table(results: Sequence[Result], base: Result | None, best: Sequence[Result]) -> str:
    """A Markdown table with a row for each result, in the order given. Sizes and perplexities are also
    relative to those of `base`, if there is one. Results among `best` are in bold.

    >>> whole = Result(parse_formats("16/16"), 20_000_000, 16.0, Score(nats=2.0, tokens=1, bytes=1))
    >>> small = Result(parse_formats("4/2g32"), 5_000_000, 2.51, Score(nats=2.1, tokens=1, bytes=1))
    >>> print(table([whole, small], whole, [small]))
    | attention | experts | head | bits per expert weight | MB | of 16/16 | perplexity | over 16/16 | bits per byte |
    |---|---|---|---|---|---|---|---|---|
    | 16 | 16 | 16 | 16.00 | 20.00 | 100.0 % | 7.389 | +0.0 % | 2.8854 |
    | **4** | **2g32** | **16** | 2.51 | 5.00 | 25.0 % | 8.166 | +10.5 % | 3.0297 |
    """  # noqa: E501
    names = ["attention", "experts", "head", "bits per expert weight", "MB", "of 16/16", "perplexity",
             "over 16/16", "bits per byte"]  # fmt: skip
    fast = any(one.fast for one in results)
    names += ["fast product"] * fast
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for one in results:
        bold = "**" if one in best else ""
        size, over = "-", "-"
        if base:
            size = f"{one.bytes / base.bytes:.1%}".replace("%", " %")
            over = f"{one.score.perplexity / base.score.perplexity - 1:+.1%}".replace("%", " %")
        row = [
            *(f"{bold}{spec}{bold}" for spec in one.formats.by_kind().values()),
            f"{one.expert_bits:.2f}", f"{one.bytes / 1e6:.2f}", size,
            f"{one.score.perplexity:.3f}", over, f"{one.score.bits_per_byte:.4f}",
        ]  # fmt: skip
        if fast:
            change = one.fast.perplexity / one.score.perplexity - 1 if one.fast else None
            row.append("-" if change is None else f"{change:+.2%}".replace("%", " %"))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def markdown(results: Sequence[Result]) -> str:
    """Tables of all pairs of widths, of all formats of experts with attention at 4 bits, and of the rest, as
    far as measured. The first two have the head at 16 bits."""
    base = next((one for one in results if not one.formats.quantized), None)
    plain = [one for one in results if not one.formats.head.quantized]
    best = frontier(results)
    pairs = [one for one in plain if {str(one.formats.attention), str(one.formats.experts)}.issubset(WIDTHS)]
    others = sorted(
        (one for one in plain if str(one.formats.attention) == "4" and one.formats.experts.quantized),
        key=lambda one: -one.bytes,
    )
    tables = [table(pairs, base, best)] if pairs else []
    if set(others) - set(pairs):
        tables.append(table(others, base, best))
    rest = [one for one in results if one not in pairs and one not in others]
    if rest:
        tables.append(table(rest, base, best))
    return "\n\n".join([*tables, "In bold: no other measured here is both as small and as good."])


def plot(results: Sequence[Result], file: Path) -> None:
    """Draw size against perplexity: a dot for each result in the color of its attention, and the frontier as
    a stair below and left of which there is no dot."""
    pyplot, ticker = import_matplotlib()
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    best = frontier(results)
    axes.step(*coordinates(best), where="post", color="#b0b0b0", linewidth=1.2, zorder=1)
    for bits, color in COLORS.items():
        group = [one for one in results if one.formats.attention.bits == bits]
        if group:
            axes.scatter(*coordinates(group), s=26, color=color, label=f"attention at {bits} bits", zorder=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.margins(0.1)
    axes.set_xlabel("size of the tensors, MB")
    axes.set_ylabel("held-out perplexity per token")
    axes.set_title("Formats of attention/experts; in bold, those on the size-quality frontier", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    label(axes, best, results)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def label(axes: Any, best: Sequence[Result], results: Sequence[Result]) -> None:
    """Write each dot's formats at the corner of it that hides the fewest dots and earlier labels. The
    frontier's come first, and prefer to be below."""
    points = axes.transData.transform(list(zip(*coordinates(results), strict=True)))  # pixels
    boxes: list[Any] = []
    for one in [*best, *(one for one in results if one not in best)]:
        ((x,), (y,)), color = coordinates([one]), COLORS[one.formats.attention.bits]
        weight = "bold" if one in best else "normal"
        text = axes.annotate(
            short(one.formats), (x, y), (0, 0), textcoords="offset points",
            fontsize=8, color=color, fontweight=weight,
        )  # fmt: skip
        corners = [("right", "top"), ("left", "top"), ("right", "bottom"), ("left", "bottom")]
        costs: list[tuple[int, int, str, str]] = []  # what is hidden, the order of preference
        for h, v in corners if one in best else reversed(corners):
            move(text, h, v)
            box = text.get_window_extent()
            hidden = box.count_overlaps(boxes) + box.count_contains(points)
            costs.append((hidden, len(costs), h, v))
        _, _, h, v = min(costs)
        move(text, h, v)
        boxes.append(text.get_window_extent())


def move(text: Any, horizontal: str, vertical: str) -> None:
    """Put an annotation to the left of its dot ("right"-aligned) or to the right, above or below."""
    text.set(ha=horizontal, va=vertical)
    text.xyann = (-4 if horizontal == "right" else 4, -4 if vertical == "top" else 4)


def coordinates(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    return [one.bytes / 1e6 for one in results], [one.score.perplexity for one in results]


def import_matplotlib() -> tuple[Any, Any]:
    """Its pyplot, drawing to files alone, and its ticker. Raises `OptionError` if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise OptionError("--plot needs matplotlib; install it, or this package as .[plot]") from error
    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    return pyplot, ticker


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
