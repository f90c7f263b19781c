"""Buffers small enough for a test."""

import pytest

from tools.bench import link


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BUFFER", "MEMORY"):
        monkeypatch.setattr(link, name, 1 << 20)
