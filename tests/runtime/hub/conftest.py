"""A small hub, a cache of its own, and the demo model to download."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.loopback_hub import LoopbackHub
from runtime.engine import DEMO

NAME = "org/demo"
WEIGHTS = "model.safetensors"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A running hub, which `huggingface_hub` takes for the real one."""
    from huggingface_hub import constants

    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    with LoopbackHub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr("runtime.hub.fetching.PAUSE", 0.01)
        yield running


@pytest.fixture
def demo(hub: LoopbackHub, tmp_path: Path) -> Path:
    """The demo model, which the hub has beside files that nobody needs."""
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    (folder / "pytorch_model.bin").write_bytes(bytes(5000))
    (folder / "consolidated.safetensors").write_bytes(bytes(5000))
    (folder / "README.md").write_text("# Demo")
    hub.add(NAME, folder)
    return folder
