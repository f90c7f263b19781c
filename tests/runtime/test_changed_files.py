"""What becomes of an engine whose mapped files are written to, cut short, replaced or removed."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import Engine, RequestError, SamplingParams
from runtime.passes import Pass
from tests.quantized import quantize_folder

ROOT = Path(__file__).resolve().parents[2]
IDS = [1, *range(30, 75), 2, 2]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
CUTTING = """
import os, sys
from pathlib import Path
from typing import Any
from model.mixtral import Mixtral
from runtime.shell.command import launch

forward = Mixtral.forward

def cut(*words, **more):
    _, *layers = sorted(Path(sys.argv[2]).glob("*.safetensors"))  # the first has the embeddings
    for path in layers:
        os.truncate(path, 0)
    return forward(*words, **more)

Mixtral.forward = cut
launch("runtime.generate")
"""


@pytest.fixture(scope="module")
def made(variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = variant(hidden=128, head_dim=32, ffn=256)
    return quantize_folder(source, tmp_path_factory.mktemp("quantized") / "model", "3")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return shutil.copytree(made, tmp_path / "model")


def change_size(path: Path) -> None:
    os.truncate(path, 1000)


def change_bytes(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


@pytest.mark.parametrize(("change", "what"), [
    (change_size, r"had \d+ bytes when it was mapped and has 1000 now"), (change_bytes, "was written to"),
])  # fmt: skip
def test_a_file_that_changes_between_requests(
    folder: Path, load: Callable[..., Engine], change: Callable[[Path], None], what: str
) -> None:
    engine = load(folder)
    assert len(list(engine.generate(IDS, GREEDY))) == 8
    path = max(folder.glob("*.safetensors"))
    session = engine.session()
    change(path)
    for ask in (
        lambda: engine.logits(IDS),
        lambda: next(engine.generate(IDS, GREEDY)),
        lambda: next(session.complete(IDS, GREEDY)),
    ):
        with pytest.raises(RequestError, match=rf"{path.name}: {what}.* load the model again$"):
            ask()


def test_a_file_that_changes_between_tokens_or_in_a_forward(
    folder: Path, load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(folder)
    tokens = engine.generate(IDS, GREEDY)
    next(tokens)
    begin = engine.runner.passes.begin_each

    def changing(*arguments: Any) -> Pass:
        change_bytes(max(folder.glob("*.safetensors")))
        return begin(*arguments)

    monkeypatch.setattr(engine.runner.passes, "begin_each", changing)
    with pytest.raises(RequestError, match="was written to"):
        next(tokens)


def test_a_file_that_is_out_of_reach_fails_requests_while_it_is(
    folder: Path, load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(folder)
    before = engine.logits(IDS)

    def gone(descriptor: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "fstat", gone)
    with pytest.raises(RequestError, match=r"cannot be read any more .*; load the model again"):
        engine.logits(IDS)
    monkeypatch.undo()
    assert torch.equal(engine.logits(IDS), before)


def test_a_file_that_is_replaced_or_removed_stays_as_it_was(
    folder: Path, load: Callable[..., Engine]
) -> None:
    engine = load(folder)
    before = engine.logits(IDS)
    first, *others = sorted(folder.glob("*.safetensors"))
    first.with_name("new").write_bytes(b"x" * 5000)
    first.with_name("new").rename(first)
    for path in others:
        path.unlink()
    assert torch.equal(engine.logits(IDS), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # with kernels of different makers
def test_a_command_whose_file_is_cut_short_in_a_forward_ends_with_a_line(folder: Path, dtype: str) -> None:
    if dtype == "bfloat16" and not find_spec("numba"):
        pytest.skip("nothing that a forward reads is mapped")
    words = ["--model", str(folder), "--device", "cpu", "--dtype", dtype, "--prompt", "def", "--quiet"]
    words += ["--threads", "2"]
    done = python("-c", CUTTING, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: a file of the model was cut short while it was in use, or its disk fails (SIGBUS); "
        "load the model again"
    ]


def test_where_the_user_asks_for_a_traceback_there_is_one(folder: Path) -> None:
    words = ["--model", str(folder), "--device", "cpu", "--dtype", "float32", "--prompt", "def", "--quiet"]
    done = python("-X", "faulthandler", "-c", CUTTING, *words)
    assert done.returncode == -signal.SIGBUS and done.stderr.startswith("Fatal Python error")


def python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120
    )
