"""Models by name: what is downloaded, what is not, and what is said when it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dev.loopback_hub import LoopbackHub
from model.checkpoint import open_checkpoint, save_hf
from runtime import Engine, EngineOptions, SamplingParams
from runtime.errors import DeviceError
from runtime.hub.headers import FIRST
from runtime.hub.opening import find_folder, find_settings, open_headers
from tests.model.checkpoint.conftest import TINY, random_model
from tests.runtime.hub.conftest import NAME, ROOT, WEIGHTS

GREEDY = SamplingParams(max_new_tokens=5, temperature=0)


def test_a_name_is_downloaded_once(hub: LoopbackHub, demo: Path, cache: Path) -> None:
    with Engine.load(NAME, EngineOptions(device="cpu")) as engine:
        text = [token.id for token in engine.generate("def ", GREEDY)]
    with Engine.load(demo, EngineOptions(device="cpu")) as engine:
        assert text == [token.id for token in engine.generate("def ", GREEDY)]
    fetched = {request.file for request in hub.requests if request.sent}
    assert fetched == {"config.json", WEIGHTS, "tokenizer.model"}
    assert hub.served(WEIGHTS) == [(0, FIRST), (0, (demo / WEIGHTS).stat().st_size)]
    hub.requests.clear()
    folder = find_folder(NAME)
    assert hub.requests == [] and folder.is_relative_to(cache)
    assert (folder / WEIGHTS).read_bytes() == (demo / WEIGHTS).read_bytes()


def test_an_existing_folder_wins(
    hub: LoopbackHub, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert find_folder(NAME) == Path(NAME) and hub.requests == []


def test_a_broken_download_goes_on(hub: LoopbackHub, demo: Path) -> None:
    size = (demo / WEIGHTS).stat().st_size
    cuts = iter([100_000, 0, 1, 50_000, 0, 0, 77_777])
    hub.breaks = lambda file, left: next(cuts, None) if file == WEIGHTS and left > FIRST else None
    folder = find_folder(NAME)
    answers = hub.served(WEIGHTS)
    assert (folder / WEIGHTS).read_bytes() == (demo / WEIGHTS).read_bytes()
    assert len(answers) == 9 and sum(sent for _, sent in answers) == size + FIRST


def test_headers_are_enough_to_plan(hub: LoopbackHub, demo: Path) -> None:
    assert Engine.plan(NAME).as_dict() == Engine.plan(demo).as_dict()
    assert sum(sent for _, sent in hub.served(WEIGHTS)) < 100_000
    assert open_headers(NAME).description == open_headers(demo).description


def test_nothing_is_printed(hub: LoopbackHub, demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program that embeds the engine gets no output, and progress if it asks for it."""
    counts: list[int] = []
    totals: list[int] = []

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield counts.append

    hub.breaks = lambda file, left: left // 2 if file == WEIGHTS and left > FIRST else None
    find_folder(NAME, bar)
    assert totals == [(demo / WEIGHTS).stat().st_size] and sum(counts) == totals[0]
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_comes_without_weights(hub: LoopbackHub, demo: Path) -> None:
    folder = find_settings(NAME)
    assert (folder / "tokenizer.model").read_bytes() == (demo / "tokenizer.model").read_bytes()
    assert hub.served(WEIGHTS) == []


def test_consolidated_weights_are_taken_where_there_are_no_others(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "mistral"
    save_hf(random_model(TINY), folder)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (folder / "consolidated.00.pth").write_bytes(bytes(5000))
    hub.add("org/mistral", folder)
    assert open_checkpoint(find_folder("org/mistral")).description == open_checkpoint(folder).description
    assert not [request for request in hub.requests if request.file.endswith(".pth")]


def test_the_command_downloads(hub: LoopbackHub, demo: Path, tmp_path: Path) -> None:
    flags = ["--prompt", "def ", "--temperature", "0", "--max-new-tokens", "5", "--device", "cpu", "--quiet"]
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }
    texts = [
        subprocess.run(
            [sys.executable, "-m", "runtime.generate", "--model", model, *flags],
            env=environment, cwd=ROOT, capture_output=True, text=True,
        )
        for model in (NAME, str(demo))
    ]  # fmt: skip
    assert texts[0].stderr == "" and texts[0].returncode == 0
    assert texts[0].stdout == texts[1].stdout != ""
    assert (tmp_path / "home/hub/models--org--demo/refs/main").is_file()


def test_what_does_not_fit_is_not_downloaded(hub: LoopbackHub, demo: Path) -> None:
    with pytest.raises(DeviceError, match="ram"):
        Engine.load(NAME, EngineOptions(device="cpu", ram="1MiB"))
    assert all(start + sent <= 1 << 16 for start, sent in hub.served(WEIGHTS))
