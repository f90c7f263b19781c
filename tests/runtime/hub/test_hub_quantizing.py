"""`tools.quantize` with models at the hub: commits, files that the cache has, GGUF, and room on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from dev.loopback_hub import LoopbackHub
from model.checkpoint import save_hf
from runtime.engine import DEMO
from runtime.hub import ranges
from runtime.hub.errors import AGAIN
from runtime.hub.headers import FIRST
from runtime.hub.opening import find_folder
from tests.model.checkpoint.conftest import TINY, random_model, read_all
from tests.runtime.hub.test_hub_revisions import SHAPE, changed
from tests.tools.quantize.sources.gguf_writer import facts_of, gguf_tensors, of_one_type, write_gguf
from tools.quantize import command, output
from tools.quantize.names import DOWNLOAD
from tools.quantize.sources.opening import open_model

FLAGS = ["--attention", "8", "--experts", "8", "--head", "8", "--threads", "1", "--device", "cpu", "--quiet"]
NAME = "org/a-mixtral"
LAST = "model-00005"


@pytest.fixture
def source(hub: LoopbackHub, tmp_path: Path) -> Path:
    folder = tmp_path / "first" / "a-mixtral"
    save_hf(random_model(SHAPE), folder, max_shard_bytes=1_000_000)
    shutil.copy(DEMO / "tokenizer.model", folder)
    hub.add(NAME, folder)
    return folder


@pytest.fixture
def quantize(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command. Returns what it said to stderr."""

    def run(*arguments: object, status: int = 0) -> str:
        assert command.main([*FLAGS, *map(str, arguments)]) == status
        error = capfd.readouterr().err
        assert error.count("\n") <= 1
        return error

    return run


Quantize = Callable[..., str]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def last(source: Path) -> str:
    (path,) = source.glob(f"{LAST}*")
    return path.name


def broken_off(hub: LoopbackHub, quantize: Quantize, out: Path, file: str = LAST, name: str = NAME) -> None:
    """Begin to quantize a model, and lose the connection for good in the middle of a weight file."""
    cuts = iter([100_000])
    hub.breaks = lambda found, left: next(cuts, 0) if found.startswith(file) and left != FIRST else None
    error = quantize(name, out, status=1)
    assert error == f"error: {name}: no connection to {hub.url} (RemoteProtocolError); {AGAIN}\n"
    assert (out / "quantize.journal.json").is_file() and list((out / DOWNLOAD).rglob("*.safetensors"))
    hub.breaks = lambda found, left: None
    hub.requests.clear()


def test_a_branch_moves_between_two_runs(
    hub: LoopbackHub, source: Path, tmp_path: Path, quantize: Quantize
) -> None:
    quantize(source, tmp_path / "expected")
    old = hub.models[NAME].revisions["main"]
    broken_off(hub, quantize, tmp_path / "out")
    other = changed(source, tmp_path / "second" / "a-mixtral", last(source))
    new = hub.add(NAME, other)
    assert quantize(NAME, tmp_path / "out") == ""
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not any(new in request.path for request in hub.requests)
    assert any(old in request.path for request in hub.requests)
    quantize(NAME, tmp_path / "new")
    quantize(other, tmp_path / "expected-new")
    assert contents(tmp_path / "new") == contents(tmp_path / "expected-new") != contents(tmp_path / "out")


def test_another_revision_is_another_source(
    hub: LoopbackHub, source: Path, tmp_path: Path, quantize: Quantize
) -> None:
    broken_off(hub, quantize, out := tmp_path / "out")
    other = changed(source, tmp_path / "second" / "a-mixtral", last(source))
    hub.add(NAME, other, "v2")
    hub.add("others/a-mixtral", other)
    for name in (f"{NAME}@v2", "others/a-mixtral"):
        assert quantize(name, out, status=1) == (
            f"error: {out}: holds an unfinished run with another revision of the source; repeat its command "
            "to finish it, or begin anew with --force\n"
        )
    quantize(f"{NAME}@v2", out, "--force")
    quantize(other, tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")


def test_files_of_the_cache_are_used_and_stay(
    hub: LoopbackHub, source: Path, tmp_path: Path, quantize: Quantize
) -> None:
    from huggingface_hub import hf_hub_download

    names = sorted(path.name for path in source.glob("*.safetensors"))
    cached = [Path(hf_hub_download(NAME, name)) for name in (names[1], names[-1])]
    hub.requests.clear()
    quantize(source, tmp_path / "expected")
    quantize(NAME, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert all(path.is_file() for path in cached)
    assert {request.file for request in hub.requests if request.sent and "safe" in request.file} == {
        "model.safetensors.index.json",
        *names[:1],
        *names[2:-1],
    }


def test_a_model_in_the_cache_is_not_asked_for(
    hub: LoopbackHub, source: Path, tmp_path: Path, quantize: Quantize
) -> None:
    folder = find_folder(NAME)
    hub.requests.clear()
    quantize(source, tmp_path / "expected")
    quantize(NAME, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert hub.requests == [] and list(folder.glob("*.safetensors"))


def test_progress(hub: LoopbackHub, source: Path, tmp_path: Path) -> None:
    """Each file's download shows how far it has come, and counts what came before."""
    bars: list[tuple[int, list[int]]] = []

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[int], None]]:
        bars.append((total, []))
        yield bars[-1][1].append

    model = open_model(NAME, tmp_path / "out", bar)
    names = [f"layers.0.block_sparse_moe.experts.{number}.w2.weight" for number in range(4)]
    extents = [extent for name in names for extent in model.extents(name)]
    cuts = iter([0, 10_000])
    hub.breaks = lambda file, left: next(cuts, None)
    model.files.bring(extents)
    hub.requests.clear()
    model.files.bring(extents)
    assert [total for total, _ in bars] == [sum(stop - start for _, start, stop in extents)] * 2
    assert all(sum(counts) == total for total, counts in bars)
    assert len(bars[1][1]) < len(bars[0][1]) and hub.requests == []


def test_another_tokenizer_by_name(
    hub: LoopbackHub, source: Path, demo: Path, tmp_path: Path, quantize: Quantize
) -> None:
    (source / "tokenizer.model").unlink()
    quantize(NAME, tmp_path / "out", "--tokenizer", "org/demo")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (demo / "tokenizer.model").read_bytes()
    assert hub.served("model.safetensors") == []


@pytest.mark.parametrize("boot", ["", "another", None])
def test_after_a_crash_of_the_system(
    hub: LoopbackHub,
    source: Path,
    tmp_path: Path,
    quantize: Quantize,
    monkeypatch: pytest.MonkeyPatch,
    boot: str | None,
) -> None:
    """What had come counts as long as the system has run. Afterwards the disk may lack it."""
    quantize(source, tmp_path / "expected")
    broken_off(hub, quantize, out := tmp_path / "out")
    if boot != "":
        for path in (out / DOWNLOAD).rglob("*.safetensors"):
            path.write_bytes(bytes(path.stat().st_size))
        monkeypatch.setattr(ranges, "BOOT", tmp_path / "boot")
        if boot is not None:
            (tmp_path / "boot").write_text(boot)
    quantize(NAME, out)
    assert contents(out) == contents(tmp_path / "expected")


def test_a_strangers_folder_is_left_alone(
    hub: LoopbackHub, source: Path, tmp_path: Path, quantize: Quantize
) -> None:
    thesis = tmp_path / "out" / DOWNLOAD / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("all my work")
    line = f"error: {tmp_path / 'out'}: not empty, and not an output of this tool; choose another folder\n"
    assert quantize(NAME, tmp_path / "out", status=1) == line
    assert thesis.read_text() == "all my work"


def test_downloads_of_an_earlier_source_go(
    hub: LoopbackHub, source: Path, tmp_path: Path, quantize: Quantize
) -> None:
    broken_off(hub, quantize, out := tmp_path / "out")
    quantize(source, out, "--force")
    quantize(source, tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")


def test_room_on_the_disk(
    hub: LoopbackHub, source: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output and its largest file's source have to fit. What has come of that needs no more room."""
    quantize(source, tmp_path / "expected")
    written = sum(path.stat().st_size for path in (tmp_path / "expected").glob("*.safetensors"))
    layer = 2 * sum(each.numel() for each in random_model(SHAPE).layers[0].parameters())
    needed = written + layer + output.OTHER_FILES

    def disk(free: int) -> None:
        monkeypatch.setattr(output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))

    disk(needed - 1)
    assert " are to be written and " in quantize(NAME, tmp_path / "out", status=1)
    assert sum(sent for file in source.iterdir() for _, sent in hub.served(file.name)) < written
    disk(needed)
    broken_off(hub, quantize, out := tmp_path / "out")
    taken = sum(output.occupied(path) for path in out.rglob("*.safetensors"))
    disk(needed - taken)
    assert quantize(NAME, out) == ""
    assert contents(out) == contents(tmp_path / "expected")


def test_a_full_disk(
    hub: LoopbackHub, source: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ranges, "receive_all", full)
    commit = hub.models[NAME].revisions["main"]
    assert quantize(NAME, tmp_path / "out", status=1) == (
        f"error: {NAME}: the disk is full ({tmp_path / 'out' / DOWNLOAD / commit}); make room, and {AGAIN}\n"
    )


@pytest.fixture
def gguf(hub: LoopbackHub, tmp_path: Path) -> Path:
    """A model in two types, one of them in parts, in a folder of its own."""
    save_hf(random_model(TINY), tmp_path / "hf", torch.float32)
    tensors = gguf_tensors(TINY, read_all(tmp_path / "hf"), "merged")
    folder = tmp_path / "gguf"
    (folder / "Q8_0").mkdir(parents=True)
    write_gguf(folder / "a-F16.gguf", tensors, of_one_type(Type.F16), facts_of(TINY))
    write_gguf(
        folder / "Q8_0/a-Q8_0.gguf", tensors, of_one_type(Type.F16), facts_of(TINY), split_max_tensors=8
    )
    hub.add("org/gguf", folder)
    return folder


TINYS = ("--attention", "16", "--experts", "16", "--head", "16", "--tokenizer", DEMO)


def test_gguf_by_name(hub: LoopbackHub, gguf: Path, tmp_path: Path, quantize: Quantize) -> None:
    parts = sorted(path.relative_to(gguf) for path in gguf.glob("Q8_0/*"))
    assert len(parts) > 2
    for number, file in enumerate(["a-F16.gguf", parts[0], parts[-1]]):
        hub.requests.clear()
        quantize(gguf / file, tmp_path / f"expected-{number}", *TINYS)
        quantize(f"org/gguf/{file}@main", tmp_path / f"out-{number}", *TINYS)
        assert contents(tmp_path / f"out-{number}") == contents(tmp_path / f"expected-{number}")
        fetched = {Path(request.file) for request in hub.requests if request.sent}
        assert fetched == ({Path("a-F16.gguf")} if number == 0 else set(parts) if number == 1 else set())


def test_gguf_of_one_model_needs_no_file(
    hub: LoopbackHub, gguf: Path, tmp_path: Path, quantize: Quantize
) -> None:
    (gguf / "a-F16.gguf").unlink()
    hub.add("org/one", gguf)
    quantize("org/one", tmp_path / "out", *TINYS)
    assert (tmp_path / "out/config.json").is_file()


def test_gguf_of_several_models_is_refused(
    hub: LoopbackHub, gguf: Path, tmp_path: Path, quantize: Quantize
) -> None:
    parts = sorted(path.relative_to(gguf) for path in gguf.glob("Q8_0/*"))
    listed = f"'{parts[0]}', 'a-F16.gguf'"
    assert quantize("org/gguf", tmp_path / "out", status=1) == (
        f"error: org/gguf: 2 models in GGUF ({listed}); name a file of one, as org/gguf/FILE.gguf\n"
    )
    assert quantize("org/gguf/b.gguf", tmp_path / "out", status=1) == (
        f"error: org/gguf: no file 'b.gguf'; it has {listed}\n"
    )
    hub.add("org/none", DEMO)
    assert quantize("org/none/b.gguf", tmp_path / "out", status=1) == (
        "error: org/none: no file 'b.gguf', and no other in GGUF\n"
    )
    assert not [request for request in hub.requests if request.sent]
