"""The drawings of the docs: that all can be drawn, and that the docs have them."""

from pathlib import Path

import pytest

from dev import canvas, figures


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert figures.main(["--out", str(tmp_path)]) == 0
    for name in figures.FIGURES:
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 8 * canvas.DPI  # pixels wide
        assert (figures.OUT / f"{name}.png").is_file()
