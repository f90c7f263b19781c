"""The docs' picture of the page: that it can be taken, and that the docs have it."""

from pathlib import Path

import pytest

from dev import page_figure
from dev.chromium import find_chromium

WIDTH = int(page_figure.SIZE[0] * page_figure.SCALE)


def test_the_docs_have_it() -> None:
    data = (page_figure.OUT / "page.png").read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") == WIDTH


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_it_is_taken(tmp_path: Path) -> None:
    assert page_figure.main(["--out", str(tmp_path)]) == 0
    data = (tmp_path / "page.png").read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") == WIDTH


def test_without_a_browser_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dev.chromium.find_chromium", lambda: None)
    monkeypatch.setattr("dev.page_figure.serving", lambda *flags: pytest.fail("began to serve"))
    assert page_figure.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1
