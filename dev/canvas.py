"""What the drawings in the docs are made with: boxes, texts and arrows on a canvas."""

from pathlib import Path
from typing import Any

from runtime.errors import MixtralError

DPI = 160  # a canvas unit is 1/100 inch, so a figure of 800 units is 1280 pixels wide
INK, FAINT, LINE = "#222222", "#6b6b6b", "#9a9a9a"
PLAIN = "#f4f4f2"


class Canvas:
    """A drawing in units of 1/100 inch, x to the right and y down."""

    def __init__(self, width: int, height: int) -> None:
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise MixtralError("figures need matplotlib; install it by: pip install matplotlib") from None
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=DPI, facecolor="white")
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        text: str = "",
        fill: str = PLAIN,
        size: float = 9,
        **more: Any,
    ) -> None:
        """A rounded box with its text in the middle. `more` goes to the patch."""
        from matplotlib.patches import FancyBboxPatch

        style: dict[str, Any] = {"edgecolor": LINE, "linewidth": 1.0} | more
        self.axes.add_patch(
            FancyBboxPatch((x + 3, y + 3), w - 6, h - 6, boxstyle="round,pad=3", facecolor=fill, **style)
        )
        self.text(x + w / 2, y + h / 2, text, size, "center")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 9,
        align: str = "left",
        color: str = INK,
        **more: Any,
    ) -> None:
        self.axes.text(
            x, y, text, fontsize=size, color=color, ha=align, va="center", linespacing=1.35, **more
        )

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        color: str = FAINT,
        bend: float = 0,
        **more: Any,
    ) -> None:
        from matplotlib.patches import FancyArrowPatch

        style: dict[str, Any] = {"linewidth": 1.5, "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0} | more
        self.axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", color=color, connectionstyle=f"arc3,rad={bend}", **style
            )
        )

    def save(self, path: Path) -> None:
        self.figure.savefig(path, format="png")
