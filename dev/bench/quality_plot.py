"""The picture of size against quality."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dev.bench.quality_table import Result, frontier, short
from runtime.errors import OptionError

COLORS = {16: "#1b1b1b", 8: "#7f4fa8", 4: "#1f6fb4", 3: "#d9730d", 2: "#b3282d"}  # by bits of attention


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
