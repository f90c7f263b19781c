"""`tools.quantize org/name OUT`: the output is that of the downloaded folder, and no more than what the next
file needs is ever on the disk, however often the command is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.loopback_hub import LoopbackHub
from model.checkpoint import save_hf
from model.config import ModelConfig
from runtime.engine import DEMO
from runtime.hub.ranges import RECORD
from tests.model.checkpoint.conftest import random_model
from tools.quantize.names import DOWNLOAD

ROOT = Path(__file__).resolve().parents[3]
SHAPE = ModelConfig(
    vocab=2048, hidden=128, layers=5, heads=4, kv_heads=2, head_dim=32, ffn=256, experts=4,
    experts_per_token=2, context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip
FLAGS = ["--attention", "4g32", "--experts", "3g64", "--threads", "1", "--device", "cpu", "--quiet"]
NAME = "org/a-mixtral"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that do not end where layers do, with the head in the last one."""
    folder = tmp_path_factory.mktemp("hub") / "a-mixtral"
    save_hf(random_model(SHAPE), folder, max_shard_bytes=1_300_000)
    assert len(list(folder.glob("*.safetensors"))) > 4
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(bytes(10_000))
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from tools.quantize import command

    out = tmp_path_factory.mktemp("expected") / "out"
    assert command.main([str(source), str(out), *FLAGS]) == 0
    return contents(out)


@pytest.fixture
def hub(source: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.add(NAME, source)
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def begin(hub: LoopbackHub, out: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.quantize", NAME, str(out), *FLAGS]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def weights_served(hub: LoopbackHub) -> int:
    return sum(each.sent for each in hub.requests if each.file.endswith(".safetensors"))


def test_the_output_is_the_folders(
    hub: LoopbackHub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    most = 0

    def look(file: str) -> None:
        nonlocal most
        folder = tmp_path / "out" / DOWNLOAD
        sizes = [path.stat() for path in folder.rglob("*.safetensors")]
        most = max(most, sum(each.st_blocks * 512 for each in sizes))

    hub.pause = look
    child = begin(hub, tmp_path / "out", tmp_path / "cache")
    assert child.communicate()[1] == "" and child.returncode == 0
    made = contents(tmp_path / "out")
    assert made.keys() == expected.keys()
    assert all(made[name] == expected[name] for name in expected)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    layer = 2 * sum(p.numel() for p in random_model(SHAPE).layers[0].parameters())
    trunk = 2 * 2 * SHAPE.vocab * SHAPE.hidden
    assert 0 < most < 1.2 * max(layer, trunk) + 100_000
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    headers = sum(min(path.stat().st_size, 1 << 16) for path in source.glob("*.safetensors"))
    assert total <= weights_served(hub) + headers <= total + 2 * headers


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again(
    hub: LoopbackHub, source: Path, expected: dict[str, bytes], tmp_path: Path, kills: int
) -> None:
    """Killed while bytes come or while they are quantized, it goes on, and asks for no byte that it has."""
    out, chance = tmp_path / "out", random.Random(kills)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    reached: dict[str, int] = {}  # by file, the place up to which its bytes have been on the disk
    for _ in range(kills):
        child = begin(hub, out, tmp_path / "cache")
        kill_after(hub, child, chance.randrange(total // (kills + 1)), chance.random() * 0.2)
        error = child.communicate()[1]
        assert child.returncode == -signal.SIGKILL, error
        assert all(start >= reached.get(file, 0) for file, start in asked(hub))
        reached |= places(out)
    child = begin(hub, out, tmp_path / "cache")
    assert child.communicate()[1] == "" and child.returncode == 0
    assert all(start >= reached.get(file, 0) for file, start in asked(hub))
    assert contents(out) == expected


def asked(hub: LoopbackHub) -> list[tuple[str, int]]:
    """Which weight files have been asked for since the last call, and from which byte on. Headers are not
    weights."""
    found = [
        (each.file, each.start) for each in hub.requests if each.file.endswith(".safetensors") and each.start
    ]
    hub.requests.clear()
    return found


def places(out: Path) -> dict[str, int]:
    """By file, the place that its download has come to."""
    found = {}
    for record in (out / DOWNLOAD).rglob(f"*{RECORD}"):
        number, _, about = record.read_text().partition("\n")
        came = int(number)
        for start, stop in json.loads(about)["ranges"]:
            found[record.name.removesuffix(RECORD)] = min(start + came, stop)
            if (came := came - (stop - start)) <= 0:
                break
    return found


def kill_after(hub: LoopbackHub, child: subprocess.Popen[str], size: int, delay: float) -> None:
    """Kill a process some time after it has had so many more bytes of weights, or after seconds."""
    before, deadline = weights_served(hub), time.monotonic() + 10
    hub.pause = lambda file: time.sleep(0.002)  # so that few bytes are on their way
    while weights_served(hub) < before + size and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
