"""What is downloaded when a name means another commit, or when others use the cache, too."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dev.loopback_hub import LoopbackHub, etag
from model.checkpoint import save_hf
from model.config import ModelConfig
from runtime.hub.cache import cached
from runtime.hub.headers import FIRST
from runtime.hub.names import HubName
from runtime.hub.opening import find_folder, find_settings
from tests.model.checkpoint.conftest import random_model
from tests.runtime.hub.conftest import NAME, ROOT, WEIGHTS

SHAPE = ModelConfig(
    vocab=1024, hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, ffn=256, experts=4,
    experts_per_token=2, context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip


def changed(folder: Path, to: Path, file: str) -> Path:
    """A copy of a model in which one byte of a file is another one."""
    shutil.copytree(folder, to)
    contents = bytearray((to / file).read_bytes())
    contents[-1] ^= 1
    (to / file).write_bytes(contents)
    return to


def test_revisions(hub: LoopbackHub, demo: Path, tmp_path: Path, cache: Path) -> None:
    old = hub.models[NAME].revisions["main"]
    other = changed(demo, tmp_path / "other", WEIGHTS)
    new = hub.add(NAME, other, "refs/pr/3")
    hub.add(NAME, other, "v0.2")
    for name, folder, commit in (
        (NAME, demo, old),
        (f"{NAME}@main", demo, old),
        (f"{NAME}@{old}", demo, old),
        (f"{NAME}@refs/pr/3", other, new),
        (f"{NAME}@v0.2", other, new),
        (f"{NAME}@{new}", other, new),
    ):
        for _ in range(2):
            found = find_folder(name)
            assert found == cache / "models--org--demo/snapshots" / commit
            assert (found / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
            revision = HubName.parse(name)
            assert revision is not None and cached(revision) == found
            asked, hub.requests = hub.requests, []
        assert asked == []  # the second time


def test_a_branch_that_has_moved_is_not_noticed(hub: LoopbackHub, demo: Path, tmp_path: Path) -> None:
    folder = find_folder(NAME)
    hub.add(NAME, changed(demo, tmp_path / "other", WEIGHTS))
    hub.requests.clear()
    assert find_folder(NAME) == folder and hub.requests == []


def test_a_branch_moves_between_two_parts_of_a_download(hub: LoopbackHub, demo: Path, tmp_path: Path) -> None:
    """Bytes of one commit are never taken for those of another, even if names and sizes are the same."""
    cuts = iter([5_000_000])
    hub.breaks = lambda file, left: next(cuts, 0) if file == WEIGHTS and left > FIRST else None
    with pytest.raises(Exception, match="no connection"):
        find_folder(NAME)
    other = changed(demo, tmp_path / "other", WEIGHTS)
    hub.add(NAME, other)
    hub.breaks = lambda file, left: None
    assert (find_folder(NAME) / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_files_that_are_the_same_are_not_downloaded_again(
    hub: LoopbackHub, demo: Path, tmp_path: Path
) -> None:
    find_folder(NAME)
    hub.add(NAME, changed(demo, tmp_path / "other", "tokenizer.model"), "v2")
    hub.requests.clear()
    folder = find_folder(f"{NAME}@v2")
    assert (folder / WEIGHTS).read_bytes() == (demo / WEIGHTS).read_bytes()
    assert {request.file for request in hub.requests if request.sent} <= {"tokenizer.model", WEIGHTS}
    assert hub.served(WEIGHTS) == [(0, FIRST)]


def test_what_the_library_has_downloaded_counts(hub: LoopbackHub, demo: Path) -> None:
    """A model that `huggingface_hub` has brought to the cache is found there, and it finds one of ours."""
    from huggingface_hub import hf_hub_download, snapshot_download

    snapshot_download(NAME, revision="main", allow_patterns=["*.json", "*.model", WEIGHTS])
    hub.requests.clear()
    folder = find_folder(NAME)
    assert hub.requests == []
    shutil.rmtree(folder.parent.parent)
    find_folder(NAME)
    found = hf_hub_download(NAME, WEIGHTS, local_files_only=True)
    assert Path(found) == folder / WEIGHTS


def test_a_snapshot_that_the_library_left_in_the_middle_is_completed(hub: LoopbackHub, demo: Path) -> None:
    from huggingface_hub import hf_hub_download

    for file in ("config.json", "tokenizer.model"):
        hf_hub_download(NAME, file)
    (demo / "README.md").write_text("# As it was")
    assert (find_folder(NAME) / WEIGHTS).read_bytes() == (demo / WEIGHTS).read_bytes()


def test_an_interrupted_tokenizer_is_completed(hub: LoopbackHub, demo: Path) -> None:
    """A snapshot without weights may lack any other file, too."""
    (demo / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    name = f"{NAME}@{hub.add(NAME, demo)}"
    folder = find_settings(name)
    (folder / "tokenizer_config.json").unlink()
    assert (find_settings(name) / "tokenizer_config.json").is_file()


def begin(hub: LoopbackHub, home: Path, name: str) -> subprocess.Popen[str]:
    code = f"from runtime.hub.opening import find_folder; print(find_folder({name!r}))"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def sharded(hub: LoopbackHub, demo: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    save_hf(random_model(SHAPE), folder, max_shard_bytes=700_000)
    shutil.copy(demo / "tokenizer.model", folder)
    hub.add("org/sharded", folder)
    return folder


def served(hub: LoopbackHub) -> int:
    return sum(request.sent for request in hub.requests if request.file.endswith(".safetensors"))


def test_two_processes_at_once(hub: LoopbackHub, sharded: Path, tmp_path: Path) -> None:
    """Each byte comes once, and both processes have all at the end."""
    hub.pause = lambda file: time.sleep(0.002)
    children = [begin(hub, tmp_path / "home", "org/sharded") for _ in range(2)]
    ends = [child.communicate() for child in children]
    assert ends[0] == ends[1] and ends[0][1] == ""
    folder = Path(ends[0][0].strip())
    total = headers = 0
    for path in sharded.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
        total, headers = total + path.stat().st_size, headers + min(FIRST, path.stat().st_size)
    assert total + headers <= served(hub) <= total + 2 * headers


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again(hub: LoopbackHub, sharded: Path, tmp_path: Path, kills: int) -> None:
    """What was on the disk when the process was killed is not asked for again."""
    total = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    chance, home, reached = random.Random(kills), tmp_path / "home", dict[str, int]()
    hub.pause = lambda file: time.sleep(0.003)
    for _ in range(kills):
        child = begin(hub, home, "org/sharded")
        goal, deadline = served(hub) + chance.randrange(total // (kills + 1)), time.monotonic() + 20
        while served(hub) < goal and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        check_asked(hub, reached)
        reached = places(hub, home)
    output, error = begin(hub, home, "org/sharded").communicate()
    assert error == ""
    check_asked(hub, reached)
    for path in sharded.glob("*.safetensors"):
        assert (Path(output.strip()) / path.name).read_bytes() == path.read_bytes()


def check_asked(hub: LoopbackHub, reached: dict[str, int]) -> None:
    """Check that nothing was asked for that is on the disk, but for headers."""
    for request in hub.requests:
        if request.file.endswith(".safetensors") and not (request.start == 0 and request.sent <= FIRST):
            assert request.start >= reached.get(request.file, 0)
    hub.requests.clear()


def places(hub: LoopbackHub, home: Path) -> dict[str, int]:
    """By weight file, how many of its bytes are on the disk."""
    blobs = home / "hub/models--org--sharded/blobs"
    found = {}
    (folder,) = hub.models["org/sharded"].commits.values()
    for path in folder.glob("*.safetensors"):
        for name in (etag(path), etag(path) + ".part"):
            if (blobs / name).is_file():
                found[path.name] = (blobs / name).stat().st_size
    assert all(re.fullmatch(r"[0-9a-f]+(\.part)?", blob.name) for blob in blobs.iterdir())
    return found
