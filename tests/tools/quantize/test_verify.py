"""`tools.quantize --verify`: every byte that is not the one that was written is found, and its file named."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import save_hf
from model.checkpoint.safetensors import read_header
from model.errors import ModelError
from tests.tools.quantize.test_quantize import SHAPE, contents, fail_at, model, one_line
from tests.tools.quantize.version1 import write_version1
from tools.quantize import command as quantize
from tools.quantize import verify
from tools.quantize.verify import stored_dtype

FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
FORMATS = ["--experts", "3g32", "--quiet", "--threads", "1"]


def quantized(folder: Path, seed: int, *flags: str) -> Path:
    """A checkpoint that is quantized from the weights of this seed, in `folder / "out"`."""
    made = model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + seed)
    save_hf(made, folder / "source")
    (folder / "source" / "tokenizer.model").write_bytes(b"a tokenizer")
    assert quantize.main([str(folder / "source"), str(folder / "out"), *FORMATS, *flags]) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("verify"), 0)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of other weights, and in other formats."""
    return {
        "weights": quantized(tmp_path_factory.mktemp("weights"), 1),
        "format": quantized(tmp_path_factory.mktemp("format"), 0, "--head", "16"),
    }


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(out: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*flags: str, folder: Path = out) -> tuple[int, str, str]:
        capsys.readouterr()
        return (quantize.main(["--verify", str(folder), *flags]), *capsys.readouterr())

    return call


def found(result: tuple[int, str, str]) -> list[str]:
    """The lines on damaged files. Checks that their number is told."""
    status, printed, err = result
    lines = printed.splitlines()
    assert (status, err.count("\n")) == (1, 1) and lines
    assert f": {len(lines)} of 7 files are missing or damaged; make it again from its source" in err
    return lines


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_all_is_well(run: Run, out: Path) -> None:
    before = contents(out)
    assert run() == (0, f"{out}: every byte of the weights is as it was written\n", "")
    assert contents(out) == before


EXPERT = "layers.0.block_sparse_moe.experts.1.w13."


@pytest.mark.parametrize(
    "place",
    ["codes", "codes_high", "scales", "zeros", "steps", "layers.0.input_layernorm.weight", "first", "last"],
)
def test_a_flipped_bit_of_a_tensor(run: Run, out: Path, place: str) -> None:
    tensors = read_header(out / SECOND).tensors
    entry = tensors.get(EXPERT + place) or tensors.get(place)
    first = min(entry.offset for entry in tensors.values())
    offset = entry.offset + entry.bytes // 2 if entry else {"first": first, "last": -1}[place]
    flip(out / SECOND, offset)
    assert found(run()) == [
        f"{out / SECOND}: damaged, or of another checkpoint: its bytes are not those that were written"
    ]


@pytest.mark.parametrize("place", [0, 7, 8, 20, 500, -1])
def test_a_flipped_bit_of_a_header(run: Run, out: Path, place: int) -> None:
    start = min(entry.offset for entry in read_header(out / SECOND).tensors.values())
    flip(out / SECOND, place if place >= 0 else start - 1)
    assert found(run()) == [
        f"{out / SECOND}: damaged, or of another checkpoint: its header is not the one that was written"
    ]


def test_files_of_other_lengths_and_of_other_checkpoints(run: Run, out: Path, twins: dict[str, Path]) -> None:
    sizes = {name: len(data) for name, data in contents(out).items()}
    os.truncate(out / FIRST, sizes[FIRST] - 1)
    shutil.copy(twins["weights"] / SECOND, out / SECOND)  # with the same header
    shutil.copy(twins["format"] / THIRD, out / THIRD)
    assert (out / SECOND).stat().st_size == sizes[SECOND]
    assert found(run()) == [
        f"{out / name}: damaged, or of another checkpoint: {why}"
        for name, why in (
            (FIRST, f"{sizes[FIRST] - 1} bytes, and {sizes[FIRST]} were written"),
            (SECOND, "its bytes are not those that were written"),
            (THIRD, "its header is not the one that was written"),
        )
    ]


def test_missing_files(run: Run, out: Path) -> None:
    for name in (SECOND, "tokenizer.model", "model.safetensors.index.json"):
        (out / name).unlink()
    assert found(run()) == [
        f"{out / name}: missing" for name in ("model.safetensors.index.json", "tokenizer.model", SECOND)
    ]


def test_a_disk_that_fails(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify.sha256

    def failing(path: Path, advance: Callable[[int], None]) -> str:
        if path.name == SECOND:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, advance)

    monkeypatch.setattr(verify, "sha256", failing)
    flip(out / THIRD, -1)
    assert [line.partition(": ")[2] for line in found(run())] == [
        "cannot be read (Input/output error)",
        "damaged, or of another checkpoint: its bytes are not those that were written",
    ]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(sha256=[]),
        lambda record: record.update(sha256=None),
        lambda record: record["sha256"].pop(FIRST),
        lambda record: record["sha256"].update({"thesis.txt": "0" * 64}),
        lambda record: record["sha256"].update({FIRST: "0" * 63}),
    ],
)
def test_a_damaged_record(run: Run, out: Path, change: Callable[[Any], object]) -> None:
    edit(out / "quantization.json", change)
    assert found(run()) == [f"{out / 'quantization.json'}: damaged, or of another checkpoint"]


def test_a_record_that_is_none(run: Run, out: Path) -> None:
    (out / "quantization.json").write_text("{")
    status, printed, err = run()
    assert status == 1 and "quantization.json: cannot be read as JSON" in printed
    assert "1 of 5 files are missing or damaged" in err
    (out / "quantization.json").unlink()
    status, printed, err = run()
    assert (status, printed) == (1, f"{out / 'quantization.json'}: missing\n")


def test_a_damaged_index_and_a_damaged_configuration(run: Run, out: Path) -> None:
    index = out / "model.safetensors.index.json"
    whole = index.read_text()
    index.write_text("{")
    assert f"{index}: cannot be read as JSON" in one_line(run())
    index.write_text(whole)
    edit(out / "config.json", lambda config: config.update(torch_dtype="float32"))
    assert "torch_dtype is 'float32', and must be one of ['bfloat16', 'float16']" in one_line(run())
    edit(out / "config.json", lambda config: config.update(torch_dtype="float16"))
    assert len(found(run())) == 3
    with pytest.raises(ModelError, match="torch_dtype is None"):
        edit(out / "config.json", lambda config: config.pop("torch_dtype"))
        stored_dtype(out)


def test_earlier_checkpoints_have_no_digests(run: Run, out: Path) -> None:
    edit(out / "quantization.json", lambda record: record.pop("sha256"))
    said = one_line(run())
    assert "headers and sizes of its files are right, and their bytes cannot be compared" in said
    assert "an earlier version of this program wrote no digests to quantization.json" in said
    flip(out / SECOND, 20)
    assert f"{out / SECOND}: damaged" in found(run())[0]


def test_what_is_no_finished_checkpoint(
    run: Run, made: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such folder" in one_line(run(folder=tmp_path / "nowhere"))
    assert "not an output of this tool" in one_line(run(folder=made.parent / "source"))
    write_version1(tmp_path / "old", SHAPE, (4, 64, 256), (4, 64, 256))
    assert "version 1, and this program reads version 2; convert it" in one_line(run(folder=tmp_path / "old"))
    with monkeypatch.context() as patch:
        fail_at(20, KeyboardInterrupt(), patch)
        assert quantize.main([str(made.parent / "source"), str(tmp_path / "begun"), *FORMATS]) == 130
    assert run(folder=tmp_path / "begun")[2].endswith(
        "begun: holds an unfinished run; repeat its command to finish it\n"
    )


def test_a_run_of_verifying_that_is_interrupted(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "sha256", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run() == (130, "", f"interrupted; {out} has not been compared\n")


def test_progress_counts_every_byte(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "CHUNK_BYTES", 5000)
    counts: list[int] = []
    verify.sha256(out / FIRST, counts.append)
    assert sum(counts) == (out / FIRST).stat().st_size and len(counts) > 2


def test_writing_and_verifying_at_once(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(made.parent / "source"), tmp_path / "new"
    assert quantize.main([source, str(out), "--verify", *FORMATS]) == 0
    printed, err = capsys.readouterr()
    assert printed.endswith(f"\n{out}: every byte of the weights is as it was written\n") and err == ""
    assert quantize.main([source, str(out), "--force", "--json", "--verify", *FORMATS]) == 0
    printed, err = capsys.readouterr()
    assert len(json.loads(printed)["sha256"]) == 3
    assert err == f"{out}: every byte of the weights is as it was written\n"
    write = quantize.write_output

    def spoiling(*args: Any) -> dict[str, Any]:
        record = write(*args)
        flip(out / THIRD, -1)  # as a disk might
        return record

    monkeypatch.setattr(quantize, "write_output", spoiling)
    assert quantize.main([source, str(out), "--force", "--verify", *FORMATS]) == 1
    printed, err = capsys.readouterr()
    assert f"\n{out / THIRD}: damaged, or of another checkpoint: " in printed
    assert err.startswith("error: ") and "1 of 7 files are missing or damaged" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["folder"], "the following arguments are required: OUT"),
        (["--verify", "folder", "--force", "--head", "4"], "--head and --force without OUT: --verify alone"),
        (["--verify"], "the following arguments are required: SRC"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        quantize.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err
