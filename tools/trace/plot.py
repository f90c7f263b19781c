"""Figures from a trace, like Figures 1 and 2 of arXiv 2312.17238 but of the user's own run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoint.writer import replacing
from runtime.experts.trace import TraceError
from tools.trace.read import Trace
from tools.trace.statistics import accesses_by_layer, places, recall, replayed_ratios, routing_by_layer

DPI = 150
MAX_SIDE, MAX_PIXELS = 1 << 16, 1 << 26  # the longest side that can be drawn; what fits any memory
CACHED, MISSED = "0.87", "tab:red"
BARS = 50  # at most
PLACES = {
    "in a slot": "tab:green",
    "in host memory": "tab:orange",
    "computed by the host": "tab:blue",
    "in a file": "tab:red",
}
LINES = {
    "belady": {"color": "black", "linestyle": "--", "label": "Belady's optimum"},
    "lru": {"color": "tab:blue", "marker": "o", "label": "LRU"},
    "lfu": {"color": "tab:orange", "marker": "s", "label": "LFU"},
    "random": {"color": "tab:gray", "marker": "^", "label": "random"},
    "static": {"color": "tab:green", "marker": "v", "label": "static"},
}


def plot(trace: Trace, out: Path, layers: Sequence[int] | None = None, tokens: int = 100) -> list[Path]:
    """Write the figures that the trace has data for to folder `out`, which is made if it is missing. Returns
    their paths.

    Raises `TraceError` if matplotlib is missing, the trace has no such layers, or a figure is too large.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise TraceError("figures need matplotlib; install it by: pip install matplotlib") from None
    L = trace.header.layers
    layers = list(dict.fromkeys(layers if layers is not None else (0, L // 2, L - 1)))
    if wrong := [layer for layer in layers if not 0 <= layer < L]:
        raise TraceError(f"there is no layer {wrong[0]}; the trace's layers are 0 to {L - 1}")
    if tokens < 1:
        raise TraceError(f"{tokens} tokens make no figure; ask for at least 1")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in (
        ("experts", lambda figure: draw_experts(figure, trace, layers, tokens)),
        ("hit_ratio", lambda figure: draw_hit_ratio(figure, trace)),
        ("recall", lambda figure: draw_recall(figure, trace)),
        ("tiers", lambda figure: draw_tiers(figure, trace)),
    ):
        figure = Figure(figsize=(6, 4), layout="constrained", dpi=DPI)
        if draw(figure):
            paths.append(out / f"{name}.png")
            with replacing(paths[-1]) as file:
                figure.savefig(file, format="png")
    return paths


def draw_experts(figure: Any, trace: Trace, layers: Sequence[int], tokens: int) -> bool:
    """Draw experts over decoded tokens: which ones the gate chose and their weights, and which were cached.
    Returns False if no token was decoded."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    blues, E = colormaps["Blues"], trace.header.experts
    grids = [decoded(trace, layer, tokens) for layer in layers]
    columns = max((len(grid) for grid in grids), default=0)
    if columns == 0:
        return False
    width, height = max(6.0, 1.5 + 0.11 * columns), 0.9 + len(layers) * (0.45 + 0.16 * E)
    check_pixels(width, height, f"{columns} tokens through {len(layers)} layers of {E} experts")
    figure.set_size_inches(width, height)
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for panel, layer, grid in zip(panels, layers, grids, strict=True):
        white, grey = (1.0, 1.0, 1.0, 1.0), (float(CACHED), float(CACHED), float(CACHED), 1.0)
        cells = [
            [
                blues(0.35 + 0.65 * weights[e]) if e in weights else grey if e in cached else white
                for weights, cached in grid
            ]
            for e in range(E)
        ]
        panel.imshow(cells, aspect="auto", interpolation="nearest")
        missed = [(t, e) for t, (weights, cached) in enumerate(grid) for e in weights if e not in cached]
        panel.plot(*zip(*missed, strict=True) if missed else ([], []), ".", color=MISSED, markersize=4)
        panel.set_title(f"layer {layer}, {trace.header.slots[layer]} slots", fontsize="medium", loc="left")
        panel.set_yticks(range(E) if E <= 16 else range(0, E, 8))
        panel.set_ylabel("expert")
    panels[-1].set_xlabel("decoded token")
    figure.legend(
        handles=[
            Patch(color=blues(1.0), label="chosen, weight 1"),
            Patch(color=blues(0.35), label="chosen, weight 0"),
            Patch(color=CACHED, label="cached, not chosen"),
            Line2D([], [], linestyle="", marker=".", color=MISSED, label="miss"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return True


def check_pixels(width: float, height: float, what: str) -> None:
    """Raises `TraceError` for a figure that is too large to draw. Width and height are in inches."""
    if max(width, height) * DPI >= MAX_SIDE or width * height * DPI**2 > MAX_PIXELS:
        raise TraceError(
            f"{what} make a figure of {width * DPI:.0f} x {height * DPI:.0f} pixels, too large to draw; show "
            "fewer by --layers or --tokens"
        )


def decoded(trace: Trace, layer: int, tokens: int) -> list[tuple[dict[int, float], set[int]]]:
    """For each decoded token, the weights of its experts (1 if not recorded), and the experts cached before
    it."""
    accesses = accesses_by_layer(trace)[layer]
    resident: set[int] = set()
    grid: list[tuple[dict[int, float], set[int]]] = []
    for routing in routing_by_layer(trace)[layer]:
        if routing.tokens == 1 and len(grid) < tokens:
            weights = routing.weights or (1.0,) * len(routing.experts)
            grid.append((dict(zip(routing.experts, weights, strict=True)), set(resident)))
        for access in accesses.get(routing.step, []):
            resident.discard(-1 if access.evicted is None else access.evicted)
            if access.placed:
                resident.add(access.expert)
    return grid


def draw_hit_ratio(figure: Any, trace: Trace) -> bool:
    ratios = replayed_ratios(routing_by_layer(trace), trace.header.experts, trace.header.seed)
    panel = figure.subplots()
    for name, style in LINES.items():
        slots = [s for s, value in enumerate(ratios[name], start=1) if value is not None]
        if not slots:
            return False
        panel.plot(slots, [value for value in ratios[name] if value is not None], **style)
    count_along(panel, trace.header.experts)
    finish(panel, "slots per layer", "hit ratio")
    return True


def draw_recall(figure: Any, trace: Trace) -> bool:
    found = recall(trace)
    panel = figure.subplots()
    for distance, shares in found.items():
        label = f"{distance} layer{'s' if distance > 1 else ''} ahead"
        panel.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
    E = trace.header.experts
    panel.plot(range(1, E + 1), [g / E for g in range(1, E + 1)], color="tab:gray", ls=":", label="by chance")
    count_along(panel, E)
    finish(panel, "experts guessed", "share of the chosen experts among the guesses")
    return bool(found)


def draw_tiers(figure: Any, trace: Trace) -> bool:
    """Draw where needed experts were, in bars that each stand for some decoded tokens. Returns False if host
    memory has all experts."""
    found = places(trace) if trace.header.berths else []
    if not found:
        return False
    width = -(-len(found) // BARS)  # in tokens
    groups = [found[start : start + width] for start in range(0, len(found), width)]
    panel, below = figure.subplots(), [0.0] * len(groups)
    for place, color in PLACES.items():
        if not any(counts[place] for counts in found):
            continue
        shares = [sum(c[place] for c in group) / sum(c.total() for c in group) for group in groups]
        starts = range(0, len(found), width)
        panel.bar(starts, shares, width, below, align="edge", color=color, label=place)
        below = [bottom + share for bottom, share in zip(below, shares, strict=True)]
    finish(panel, "decoded token", "where needed experts were")
    panel.legend(loc="lower left")
    return True


def finish(panel: Any, x: str, y: str) -> None:
    """Label the axes, of which y is a ratio."""
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_ylim(0, 1.02)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def count_along(panel: Any, experts: int) -> None:
    """Have x count experts or slots."""
    panel.set_xticks(range(1, experts + 1) if experts <= 16 else range(0, experts + 1, 8))
