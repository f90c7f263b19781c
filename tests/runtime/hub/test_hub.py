"""Models by name: what is downloaded, what is not, and what is said when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from dev.loopback_hub import LoopbackHub
from runtime import Engine, EngineOptions, LoadError, SamplingParams
from runtime.hub.opening import find_folder, open_headers
from tests.runtime.hub.conftest import NAME

WEIGHTS = "model.safetensors"
GREEDY = SamplingParams(max_new_tokens=5, temperature=0)


def test_a_name_is_downloaded_once(hub: LoopbackHub, demo: Path, cache: Path) -> None:
    with Engine.load(NAME, EngineOptions(device="cpu")) as engine:
        text = [token.id for token in engine.generate("def ", GREEDY)]
    with Engine.load(demo, EngineOptions(device="cpu")) as engine:
        assert text == [token.id for token in engine.generate("def ", GREEDY)]
    fetched = {request.file for request in hub.requests if request.sent}
    assert fetched == {"config.json", WEIGHTS, "tokenizer.model"}
    assert hub.served(WEIGHTS) == [(0, (demo / WEIGHTS).stat().st_size)]
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
    hub.breaks = lambda file, left: next(cuts, None) if file == WEIGHTS else None
    folder = find_folder(NAME)
    answers = hub.served(WEIGHTS)
    assert (folder / WEIGHTS).read_bytes() == (demo / WEIGHTS).read_bytes()
    assert len(answers) == 8 and sum(sent for _, sent in answers) == size


def test_headers_are_enough_to_plan(hub: LoopbackHub, demo: Path) -> None:
    assert Engine.plan(NAME).as_dict() == Engine.plan(demo).as_dict()
    assert sum(sent for _, sent in hub.served(WEIGHTS)) < 100_000
    assert open_headers(NAME).description == open_headers(demo).description


def test_refused(hub: LoopbackHub, demo: Path) -> None:
    hub.add("org/private", demo, access="private")
    hub.add("org/gated", demo, access="gated")
    for name, line in {
        "org/none": f"org/none: no such folder, and no such model at {hub.url}, unless it is private",
        "org/private": "org/private: no such folder, and no such model",
        "org/gated": f"org/gated: gated; accept the terms at {hub.url}/org/gated, and give a token",
        f"{NAME}@v9": f"{NAME}@v9: no revision 'v9'; look at {hub.url}/{NAME}",
    }.items():
        with pytest.raises(LoadError) as error:
            find_folder(name)
        assert str(error.value).startswith(line) and "\n" not in str(error.value)
