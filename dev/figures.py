"""The drawings in README and docs: how experts move, a layer's timeline, a slot's life, tiers, the parts.

    python -m dev.figures
    python -m dev.figures --out somewhere

Figures with measured numbers come from `python -m tools.trace plot` and `python -m dev.bench quality`.
The server's page is pictured by `python -m dev.page_figure`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dev.canvas import FAINT, PLAIN, Canvas
from runtime.shell.arguments import new_parser
from runtime.shell.command import put, run

OUT = Path(__file__).resolve().parent.parent / "docs" / "figures"
TRUNK, HIT, MISS, GUESS = "#dfe3e8", "#bfe3c0", "#f8c9a0", "#bcd6f5"
DEMAND_INK, GUESS_INK = "#c25a00", "#2463b0"
WAITING: dict[str, Any] = {"hatch": "////", "edgecolor": "#cfcfcf"}
LANES = {"host": 20, "compute": 62, "link": 104}  # of a timeline, below its title


def draw_offloading() -> Canvas:
    """Slots, link, arena: where experts are, and what moves them."""
    c = Canvas(800, 345)
    c.box(10, 10, 395, 325, fill="white")
    c.text(25, 30, "GPU", 12, weight="bold")
    c.box(25, 48, 365, 36, "trunk: embeddings, attention, routers; KV cache", TRUNK)
    slots = {"layer 0": "5 2 0 7", "layer 1": "1 6 3 0", "layer 2": "3 4 7 2"}
    for row, (layer, experts) in enumerate(slots.items()):
        y = 112 + 46 * row
        c.text(30, y + 18, layer)
        for i, expert in enumerate(experts.split()):
            c.box(100 + 54 * i, y, 48, 36, expert, MISS if (row, i) == (1, 3) else HIT)
    c.text(322, 121, "a slot holds", 8.5, color=FAINT)
    c.text(322, 139, "one expert", 8.5, color=FAINT)
    c.text(30, 264, "...", 12)
    c.text(30, 298, "spares")
    for i, expert in enumerate(("", "0")):
        c.box(208 + 54 * i, 280, 48, 36, expert, GUESS if expert else "white")
    c.text(100, 290, "guesses land", 8.5, color=FAINT)
    c.text(100, 308, "only here", 8.5, color=FAINT)

    c.box(515, 10, 275, 325, fill="white")
    c.text(530, 30, "host memory", 12, weight="bold")
    c.text(530, 66, "arena: every expert of every layer", 9)
    for row in range(3):
        for number in range(8):
            fill = {(1, 0): MISS, (2, 0): GUESS}.get((row, number), PLAIN)
            c.box(527 + 32 * number, 112 + 46 * row, 28, 36, str(number), fill, 8)
    c.text(530, 264, "...", 12)

    c.text(460, 30, "link", 12, "center", weight="bold")
    c.arrow((525, 176), (312, 176), DEMAND_INK)
    c.text(460, 163, "demand", 9.5, "center", DEMAND_INK)
    c.arrow((535, 242), (312, 298), GUESS_INK, -0.1, linestyle=(0, (4, 2)))
    c.text(460, 300, "guess", 9.5, "center", GUESS_INK)
    return c


def draw_timeline() -> Canvas:
    """A layer's time: what computes, what travels, and what waits."""
    c = Canvas(800, 455)
    draw_overlap(c, 20)
    draw_graphs(c, 232)
    kinds = {"hit": HIT, "miss": MISS, "guess": GUESS, "the rest of the layer": TRUNK}
    for i, (name, fill) in enumerate(kinds.items()):
        c.box(75 + 85 * i, 424, 24, 22, "", fill)
        c.text(106 + 85 * i, 435, name, 8.5, color=FAINT)
    c.box(500, 424, 24, 22, "", "white", **WAITING)
    c.text(531, 435, "waiting for the link", 8.5, color=FAINT)
    c.text(788, 435, "not to scale", 8.5, "right", FAINT)
    return c


def draw_overlap(c: Canvas, top: float) -> None:
    """The path that computes a hit while a miss travels."""
    draw_lanes(c, top, "A prompt, and a token on a CPU: hits are computed while misses travel")
    draw_event(c, top, "compute", 75, 150, "attention", TRUNK)
    draw_event(c, top, "compute", 150, 195, "router", TRUNK)
    draw_event(c, top, "host", 193, 258, "choice", PLAIN)
    draw_event(c, top, "compute", 258, 343, "expert 2\nhit", HIT)
    draw_event(c, top, "link", 258, 383, "expert 5: w1, w3", MISS)
    draw_event(c, top, "compute", 343, 383, "", "white", **WAITING)
    draw_event(c, top, "compute", 383, 443, "expert 5\nw1, w3", MISS)
    draw_event(c, top, "link", 383, 486, "expert 5: w2", MISS)
    draw_event(c, top, "compute", 443, 486, "", "white", **WAITING)
    draw_event(c, top, "compute", 486, 521, "w2", MISS)
    draw_event(c, top, "link", 486, 720, "guess for the next layer: expert 6", GUESS)
    draw_event(c, top, "compute", 521, 557, "sum", PLAIN)
    draw_event(c, top, "compute", 557, 632, "attention", TRUNK)
    draw_event(c, top, "compute", 632, 677, "router", TRUNK)
    draw_event(c, top, "host", 675, 740, "choice", PLAIN)
    draw_event(c, top, "compute", 740, 790, "6", GUESS)
    draw_span(c, top, 75, 557, "layer")
    draw_span(c, top, 557, 790, "next layer")


def draw_graphs(c: Canvas, top: float) -> None:
    """The path with CUDA graphs, which computes hits and misses together."""
    draw_lanes(c, top, "A token on a GPU: misses travel between two CUDA graphs")
    draw_event(c, top, "compute", 75, 150, "attention", TRUNK)
    draw_event(c, top, "compute", 150, 195, "router", TRUNK)
    draw_event(c, top, "host", 193, 258, "choice", PLAIN)
    draw_event(c, top, "compute", 258, 470, "", "white", **WAITING)
    draw_event(c, top, "link", 258, 470, "expert 5", MISS)
    draw_event(c, top, "compute", 470, 512, "2", HIT)
    draw_event(c, top, "compute", 512, 554, "5", MISS)
    draw_event(c, top, "link", 470, 688, "guess for the next layer: expert 6", GUESS)
    draw_event(c, top, "compute", 554, 629, "attention", TRUNK)
    draw_event(c, top, "compute", 629, 674, "router", TRUNK)
    draw_event(c, top, "host", 672, 738, "choice", PLAIN)
    draw_event(c, top, "compute", 738, 764, "2", HIT)
    draw_event(c, top, "compute", 764, 790, "6", GUESS)
    draw_span(c, top, 75, 195, "graph")
    draw_span(c, top, 470, 674, "next graph")


def draw_lanes(c: Canvas, top: float, title: str) -> None:
    c.text(12, top, title, 10.5, weight="bold")
    for name, y in LANES.items():
        c.text(12, top + y + 18, name, 9, color=FAINT)


def draw_event(
    c: Canvas, top: float, lane: str, start: float, end: float, text: str, fill: str, **more: Any
) -> None:
    c.box(start, top + LANES[lane], end - start, 36, text, fill, 8, **more)


def draw_span(c: Canvas, top: float, start: float, end: float, text: str) -> None:
    """A line under the lanes with what it spans."""
    c.axes.plot([start + 2, end - 2], [top + 150] * 2, color=FAINT, linewidth=1.5)
    c.text((start + end) / 2, top + 162, text, 8.5, "center", FAINT)


def draw_slot() -> Canvas:
    """The states of a slot, and how slots change hands between a layer and the spares."""
    c = Canvas(800, 400)
    c.box(10, 10, 780, 220, fill="white")
    c.text(25, 30, "a layer's slots", 11, weight="bold")
    c.text(25, 52, "their number never changes", 8.5, color=FAINT)
    c.box(40, 85, 130, 60, "empty", "white", 10)
    c.box(325, 85, 130, 60, "loading", MISS, 10)
    c.box(610, 85, 130, 60, "ready", HIT, 10)
    c.arrow((170, 115), (325, 115))
    c.text(247, 102, "place", 9.5, "center")
    c.text(247, 129, "a miss", 8.5, "center", FAINT)
    c.arrow((455, 115), (610, 115))
    c.text(532, 102, "ready", 9.5, "center")
    c.text(532, 129, "the copy is complete", 8.5, "center", FAINT)
    c.arrow((645, 147), (420, 147), FAINT, -0.25)
    c.text(
        532,
        196,
        "place: the policy's victim makes room\nfor a miss; a pinned slot is never the victim",
        8.5,
        "center",
        FAINT,
    )
    c.arrow((645, 85), (705, 85), FAINT, -1.1)
    c.text(675, 40, "hit: pins + 1    release: pins - 1", 9, "center")

    c.box(10, 280, 780, 112, fill="white")
    c.text(25, 300, "spares", 11, weight="bold")
    c.text(25, 322, "slots of no layer", 8.5, color=FAINT)
    c.box(325, 312, 130, 60, "guess", GUESS, 10)
    c.box(610, 312, 130, 60, "free", "white", 10)
    c.arrow((610, 330), (455, 330))
    c.text(532, 317, "take", 9.5, "center")
    c.arrow((455, 352), (610, 352))
    c.text(532, 368, "drop: it was wrong", 9, "center")

    adoption: dict[str, Any] = {"color": GUESS_INK, "bend": 0.0}
    c.arrow((370, 312), (370, 147), **adoption)
    c.text(360, 255, "adopt: the guess came true,\nand its slot joins the layer", 8.5, "right", GUESS_INK)
    c.arrow((690, 147), (690, 312), linestyle=(0, (4, 2)), **adoption)
    c.text(680, 255, "in return, the victim's slot\nbecomes a spare", 8.5, "right", GUESS_INK)
    return c


def draw_tiers() -> Canvas:
    """Slots, berths and the file, where host memory lacks some experts, and what moves between them."""
    c = Canvas(800, 350)
    c.box(10, 10, 250, 330, fill="white")
    c.text(25, 30, "GPU", 12, weight="bold")
    c.text(25, 60, "slots of layer 3, which needs 1 and 6", 9)
    for i, (expert, fill) in enumerate({"2": HIT, "7": HIT, "6": MISS, "1": MISS}.items()):
        c.box(25 + 56 * i, 78, 50, 36, expert, fill)
    c.text(25, 136, "1 and 6 are in what were spares", 8.5, color=FAINT)
    c.text(25, 232, "spares", 9)
    for i, expert in enumerate(("", "", "0", "4")):
        c.box(25 + 56 * i, 250, 50, 36, expert, TRUNK if expert else "white")
    c.text(25, 308, "the slots of 0 and 4 are spares now", 8.5, color=FAINT)

    c.box(325, 10, 265, 330, fill="white")
    c.text(340, 30, "host memory", 12, weight="bold")
    c.text(340, 60, "berths of all layers", 9)
    for i, (expert, fill) in enumerate({"1": MISS, "6": MISS, "2": HIT, "3": PLAIN}.items()):
        c.box(340 + 60 * i, 78, 54, 36, expert, fill)
    c.text(340, 136, "1, 6, 2: doubles, which a slot has, too", 8.5, color=FAINT)
    c.text(340, 156, "3: a single, the only copy in memory", 8.5, color=FAINT)
    for i, expert in enumerate(("0", "4")):
        c.box(340 + 60 * i, 250, 54, 36, expert, TRUNK)
    c.text(340, 308, "in berths that held the oldest doubles", 8.5, color=FAINT)

    c.box(655, 10, 135, 330, fill="white")
    c.text(670, 30, "file", 12, weight="bold")
    c.text(670, 60, "every expert", 9)
    for number in range(8):
        fill = MISS if number == 6 else PLAIN
        c.box(670 + 56 * (number % 2), 78 + 52 * (number // 2), 50, 36, str(number), fill)
    c.text(292, 60, "copy", 9.5, "center", DEMAND_INK)
    c.arrow((323, 96), (263, 96), DEMAND_INK)
    c.text(622, 60, "read", 9.5, "center", DEMAND_INK)
    c.arrow((653, 96), (593, 96), DEMAND_INK)
    c.text(292, 236, "write\nback", 9.5, "center", GUESS_INK)
    c.arrow((263, 268), (323, 268), GUESS_INK)
    return c


def draw_parts() -> Canvas:
    """What depends on what. An arrow is an import."""
    c = Canvas(800, 375)
    c.box(10, 10, 380, 42, "dev: training the demo, comparisons, harness", "white")
    c.box(410, 10, 380, 42, "tools: quantize, plan, trace, perplexity, bench", "white")
    c.arrow((390, 31), (410, 31))
    c.arrow((600, 52), (600, 78))
    draw_room(c, 78, "runtime", {
        "shell": "the command", "engine": "sessions, sampler", "gpu": "steps as graphs",
        "experts": "slots, copies", "planning": "memory plan", "process": "threads, signals",
    })  # fmt: skip
    c.arrow((300, 188), (300, 216))
    c.arrow((690, 188), (690, 216))
    c.box(590, 216, 200, 149, fill="white")
    c.text(605, 236, "tokenizer", 11, weight="bold")
    c.text(605, 278, "pieces, streaming,\nchat formats", 9)
    c.text(605, 330, "no torch", 8.5, color=FAINT)
    c.box(10, 216, 560, 149, fill="white")
    c.text(25, 236, "model", 11, weight="bold")
    c.box(25, 254, 530, 40, "network: attention, router, experts, KV cache", TRUNK)
    c.box(25, 302, 170, 48, "kernels\nTriton, for a GPU", PLAIN, 8.5)
    c.box(205, 302, 170, 48, "quant\nformats and products", PLAIN, 8.5)
    c.box(385, 302, 170, 48, "checkpoint\nfiles", PLAIN, 8.5)
    return c


def draw_room(c: Canvas, y: float, name: str, parts: dict[str, str]) -> None:
    """A package with its parts in a row."""
    c.box(10, y, 780, 110, fill="white")
    c.text(25, y + 20, name, 11, weight="bold")
    for i, (part, what) in enumerate(parts.items()):
        c.box(25 + 126 * i, y + 42, 120, 52, f"{part}\n{what}", TRUNK if part == "engine" else PLAIN, 8.5)


FIGURES: dict[str, Callable[[], Canvas]] = {
    "offloading": draw_offloading,
    "timeline": draw_timeline,
    "slot": draw_slot,
    "tiers": draw_tiers,
    "parts": draw_parts,
}


def main(argv: list[str] | None = None) -> int:
    return run(lambda: figures(argv))


def figures(argv: list[str] | None) -> None:
    """Draw all figures to the folder that the command line names."""
    parser = new_parser("dev.figures", __doc__)
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help="where they go (default: docs/figures)"
    )
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = out / f"{name}.png"
        draw().save(path)
        put(f"{path}\n")


if __name__ == "__main__":
    raise SystemExit(main())
