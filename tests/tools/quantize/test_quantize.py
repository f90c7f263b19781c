"""`tools.quantize`: what it writes, what it refuses, and that no disturbance changes a byte of the result."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import open_checkpoint, save_hf
from model.checkpoint.safetensors import read_header
from model.checkpoint.writer import Writer
from model.config import ModelConfig
from model.errors import ModelError
from model.mixtral import Mixtral
from model.quant.formats import DEFAULT, KINDS, Formats
from model.quant.size import model_size
from model.quant.spec import QuantSpec
from model.quant.streams import model_fields
from model.quant.tensor import QuantizedTensor
from tests.model.checkpoint.conftest import read_all
from tools.quantize import command as quantize
from tools.quantize import lock, output
from tools.quantize.journal import NAME as JOURNAL
from tools.quantize.journal import Journal
from tools.quantize.lock import locked
from tools.quantize.names import COPIED, copied_from
from tools.quantize.weights import converted

ROOT = Path(__file__).resolve().parents[3]
SHAPE = ModelConfig(
    vocab=64, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=256, experts=3, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5, eos_ids=(2, 7),
)  # fmt: skip


def model(config: ModelConfig = SHAPE) -> Mixtral:
    torch.manual_seed(0)
    made = Mixtral(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.05)
    return made


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "a-mixtral"
    save_hf(model(), folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "unrelated.bin"):
        (folder / name).write_bytes(name.encode())
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, its output folder `out` unless told otherwise: status, stdout, stderr."""

    def call(*flags: str, source: Path = source, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        status = quantize.main([str(source), str(out), "--threads", "2", *flags])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of an undisturbed run with the default formats, on one thread."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert quantize.main([str(source), str(out), "--threads", "1", "--quiet"]) == 0
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(result: tuple[int, str, str]) -> str:
    status, out, err = result
    assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ")
    return err


@pytest.mark.parametrize("formats", ["4 2g64 8", "16 3g128 16", "8 16 3", "16 16 16", "16 16 4g32"])
def test_what_is_written(run: Run, tmp_path: Path, formats: str) -> None:
    specs = Formats(*map(QuantSpec.parse, formats.split()))
    flags = [word for kind, text in zip(KINDS, formats.split(), strict=True) for word in (f"--{kind}", text)]
    status, printed, err = run(*flags, "--json")
    assert (status, err) == (0, "")
    out = tmp_path / "out"
    report = json.loads(printed)
    assert report == json.loads((out / "quantization.json").read_text())
    assert report["source"] == "a-mixtral"
    assert {kind: report[kind]["bits"] for kind in KINDS} == {k: s.bits for k, s in specs.by_kind().items()}
    assert sorted(report["files"]) == sorted(contents(out))
    assert {"tokenizer.model", "tokenizer_config.json", "generation_config.json"} < set(report["files"])

    checkpoint = open_checkpoint(out)
    assert (checkpoint.config, checkpoint.formats) == (SHAPE, specs)
    stored, parameters = read_all(out), dict(model().named_parameters())
    assert sorted(stored) == sorted(field.name for field in model_fields(SHAPE, specs))
    shards = sorted(out.glob("*.safetensors"))
    headers = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards]
    total = model_size(SHAPE, specs).total
    assert sum(path.stat().st_size for path in shards) == total + sum(headers)
    assert report["sha256"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == {name: path.name for path in shards for name in read_header(path).tensors}

    for name, parameter in parameters.items():
        values = parameter.detach().bfloat16()
        if name in stored:
            assert torch.equal(stored[name], values)
            continue
        matrix = name.removesuffix(".weight")
        kind = "experts" if "experts" in matrix else "head" if matrix == "lm_head" else "attention"
        spec = specs.by_kind()[kind]
        assert relative_error(values.float(), read(stored, matrix, spec, values)) == pytest.approx(
            report["errors"].pop(matrix), rel=1e-4
        )
    assert report["errors"] == {}


def read(stored: dict[str, Tensor], matrix: str, spec: QuantSpec, like: Tensor) -> Tensor:
    prefix = matrix + "."
    streams = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    return QuantizedTensor.of(spec, (like.shape[0], like.shape[1]), streams).dequantize()


def relative_error(weight: Tensor, other: Tensor) -> float:
    return ((weight - other).norm() / weight.norm()).item()


def test_float32_sources_float16_sources_and_the_summary(run: Run, tmp_path: Path) -> None:
    for dtype, kept in ((torch.float32, torch.bfloat16), (torch.float16, torch.float16)):
        folder = tmp_path / str(dtype)
        save_hf(model(), folder, dtype)
        status, printed, err = run(source=folder, out=tmp_path / f"{dtype}-out")
        assert status == 0 and f"warning: {folder}: holds no tokenizer.model and " in err
        assert open_checkpoint(tmp_path / f"{dtype}-out").dtype == kept
    assert f"native, 3 files, {DEFAULT}, " in printed
    assert "experts.w13: relative error 0.08" in printed and printed.count(" at worst in layers.") == 4


def test_dimensions_that_groups_do_not_divide(run: Run, tmp_path: Path) -> None:
    said = one_line(run("--attention", "4g256"))
    assert "layers.0.self_attn.qkv_proj: 128 inputs do not divide into groups of 256; use 4g128" in said
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_no_block_of_rows_divides(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "source"
    save_hf(model(replace(SHAPE, vocab=100)), source)
    status, printed, err = run(source=source)
    assert status == 0 and "experts 4, head 16, " in printed
    assert "warning: lm_head: 100 rows are not a multiple of 16; it stays at 16 bits\n" in err
    shutil.rmtree(tmp_path / "out")
    assert "lm_head: 100 rows are not a multiple of 16; leave it at 16 bits" in one_line(
        run("--head", "8", source=source)
    )
    assert not (tmp_path / "out").exists()


def test_usage(run: Run) -> None:
    for flags in (["--experts", "5"], ["--head", "3g100"], ["--threads", "0"], ["--device", "abacus"]):
        with pytest.raises(SystemExit) as ended:
            run(*flags)
        assert ended.value.code == 2


def test_what_it_does_not_touch(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such folder" in one_line(run(source=tmp_path / "nowhere"))
    assert "source and output are the same folder" in one_line(run(out=source / "."))
    out.write_text("mine")
    assert f"{out}: a file" in one_line(run("--force"))
    out.unlink()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for flags in ([], ["--force"]):
        assert "not empty, and not an output of this tool" in one_line(run(*flags))
    shutil.copytree(source, tmp_path / "copy")
    assert "not an output of this tool" in one_line(run("--force", out=tmp_path / "copy"))
    assert contents(tmp_path / "copy") == contents(source)
    assert contents(out) == {"thesis.txt": b"mine"}


def test_a_finished_output_is_replaced_only_by_force(
    run: Run, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    assert run("--experts", "2", "--quiet")[0] == 0
    (out / "thesis.txt").write_text("mine")
    first = contents(out)
    assert "holds a finished checkpoint; choose another folder, or make it anew with --force" in one_line(
        run()
    )
    assert contents(out) == first
    assert "quantized already (native, 3 files" in one_line(run(source=out, out=tmp_path / "other"))
    assert run("--force")[0] == 0
    assert contents(out) == whole | {"thesis.txt": b"mine"}


def fail_at(number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `number`th tensor is written by half, and then this is raised."""
    write, count = Writer.write, 0

    def failing(writer: Writer, name: str, tensor: Tensor) -> None:
        nonlocal count
        count += 1
        if count == number:
            writer.file.write(b"half")
            raise error
        write(writer, name, tensor)

    monkeypatch.setattr(Writer, "write", failing)


@pytest.mark.parametrize("number", [1, 4, 20, 40])
def test_a_full_disk_and_ctrl_c(
    run: Run, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(number, OSError(errno.ENOSPC, "No space left on device"), patch)
        assert f"{out}: the disk is full; make room, and the same command goes on" in one_line(run())
    assert not list(out.glob("*.part")) and (out / JOURNAL).is_file()
    assert one_line(run(source=out, out=tmp_path / "other"))  # it is no checkpoint
    with monkeypatch.context() as patch:
        fail_at(3, KeyboardInterrupt(), patch)
        status, printed, err = run()
        assert (status, printed) == (130, "")
        assert err.splitlines()[-1] == "interrupted; the same command goes on from the last finished file"
    finished = [path.stat().st_mtime_ns for path in out.glob("*.safetensors")]
    status, _, err = run()
    assert status == 0 and ("going on after" in err) == bool(finished)
    assert contents(out) == whole
    assert set(finished) <= {path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


def test_a_disk_that_is_too_small_is_refused_at_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "MB are to be written and 1.0 kB are free; make room" in one_line(run())
    assert not (tmp_path / "out").exists()


def test_another_run_does_not_go_on_with_an_unfinished_one(
    run: Run, source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(20, KeyboardInterrupt(), patch)
        assert run("--experts", "2")[0] == 130
    begun = contents(tmp_path / "out")
    assert "unfinished run with another --experts" in one_line(run("--experts", "3"))
    assert "unfinished run with another --head" in one_line(run("--experts", "2", "--head", "16"))
    twin = tmp_path / "twin" / source.name
    shutil.copytree(source, twin)
    weights = bytearray((twin / "model.safetensors").read_bytes())
    weights[len(weights) * 51 // 100] ^= 1  # of another training, in the same headers
    (twin / "model.safetensors").write_bytes(weights)
    assert "with other files of the source; repeat its command" in one_line(
        run("--experts", "2", source=twin)
    )
    assert contents(tmp_path / "out") == begun
    assert run("--force")[0] == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"settings": {}, "files": ["../x"], "stale": [], "shards": {}}']
)
def test_a_damaged_journal(run: Run, tmp_path: Path, damage: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text(damage)
    assert "damaged; remove the folder" in one_line(run("--force"))


FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def change_shards(change: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda journal: change(journal["shards"][SECOND])


@pytest.mark.parametrize(
    "change",
    [
        lambda journal: journal.update(shards=[]),
        lambda journal: journal.update(shards={"thesis.txt": {}}),
        lambda journal: journal.update(shards={"model-00009-of-00009.safetensors": {}}),
        lambda journal: journal.update(shards={FIRST: {"layers.0.self_attn.qkv_proj": 0.1}}),
        lambda journal: journal.update(shards={FIRST: []}),
        lambda journal: journal.update(files="config.json"),
        lambda journal: journal.update(files=["thesis.txt"]),
        lambda journal: journal.update(stale=[["config.json"]]),
        lambda journal: journal.update(stale={"config.json": 1}),
        lambda journal: journal.update(settings=[]),
        lambda journal: journal.update(more=1),
        lambda journal: journal.pop("stale"),
        lambda journal: journal.pop("digests"),
        lambda journal: journal.update(digests=[]),
        lambda journal: journal["digests"].pop(SECOND),
        lambda journal: journal["digests"].update({SECOND: "0"}),
        lambda journal: journal["digests"].update({"thesis.txt": "0" * 64}),
        change_shards(lambda errors: errors.popitem()),
        change_shards(lambda errors: errors.update({"experts": 0.1})),
        change_shards(lambda errors: errors.update({min(errors): float("nan")})),
        change_shards(lambda errors: errors.update({min(errors): float("inf")})),
        change_shards(lambda errors: errors.update({min(errors): -0.1})),
        change_shards(lambda errors: errors.update({min(errors): None})),
        change_shards(lambda errors: errors.update({min(errors): True})),
        change_shards(lambda errors: errors.update({min(errors): 10**400})),
        change_shards(lambda errors: errors.update({min(errors): {"a": 0.1}})),
    ],
)
def test_a_journal_is_believed_in_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]
) -> None:
    with monkeypatch.context() as patch:
        fail_at(45, KeyboardInterrupt(), patch)
        assert run()[0] == 130
    path = tmp_path / "out" / JOURNAL
    journal = json.loads(path.read_text())
    change(journal)
    path.write_text(json.dumps(journal))
    before = contents(tmp_path / "out")
    assert "damaged; remove the folder" in one_line(run())
    assert contents(tmp_path / "out") == before


def test_a_journal_too_deep_to_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text('{"settings": ' + "[" * 10**5)
    assert "damaged; remove the folder" in one_line(run())


def test_a_shard_that_is_not_what_the_journal_says_is_made_again(
    run: Run, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(40, KeyboardInterrupt(), patch)
        assert run()[0] == 130
    shard = tmp_path / "out" / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run()[0] == 0
    assert contents(tmp_path / "out") == whole


def test_one_process_at_a_time(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with lock.locked(tmp_path / "out"):
        assert "another process is quantizing into it" in one_line(run())
        assert contents(tmp_path / "out") == {lock.NAME: b""}
    assert contents(tmp_path / "out") == {}
    assert run()[0] == 0


def test_a_lock_that_was_removed_while_it_was_awaited_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, 0

    def late(handle: int, flags: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # the process before ends between our open and our lock
            (tmp_path / lock.NAME).unlink()
        flock(handle, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.locked(tmp_path):
        assert calls == 2 and (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_locks_are_unknown_it_goes_on(
    run: Run, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(handle: int, flags: int) -> None:
        assert fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR  # NFS locks no other
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run()[0] == 0
    assert contents(tmp_path / "out") == whole


def test_links_are_not_written_through(run: Run, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out, thesis = tmp_path / "out", tmp_path / "thesis.txt"
    thesis.write_text("mine")
    assert run("--experts", "2", "--quiet")[0] == 0
    names = [*sorted(contents(out)), JOURNAL]
    for name in names:
        (out / (name + ".part")).symlink_to(thesis)
    (out / "model.safetensors.index.json").unlink()
    (out / "model.safetensors.index.json").symlink_to(thesis)
    assert run("--force")[0] == 0
    assert thesis.read_text() == "mine"
    assert contents(out) == whole and not any(path.is_symlink() for path in out.iterdir())
    (out / lock.NAME).symlink_to(tmp_path / "elsewhere")
    assert "Too many levels of symbolic links" in one_line(run("--force"))
    assert not (tmp_path / "elsewhere").exists()


def test_force_removes_only_what_this_program_writes(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--quiet")[0] == 0
    names = ["thesis.txt", ".bashrc", "consolidated.safetensors", "tokenizer.model.a b"]
    record = json.loads((out / "quantization.json").read_text())
    record["files"] += [*names, "../thesis.txt", "model-00009-of-00009.safetensors", 3, None]
    (out / "quantization.json").write_text(json.dumps(record))
    for name in [*names, "model-00009-of-00009.safetensors"]:
        (out / name).write_text("mine")
    assert run("--force")[0] == 0
    assert all((out / name).read_text() == "mine" for name in names)
    assert not (out / "model-00009-of-00009.safetensors").exists()


def test_a_copy_that_ends_early_is_refused(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output.shutil, "copyfileobj", lambda read, written: written.write(read.read(7)))
    said = one_line(run("--quiet"))
    size = (source / "generation_config.json").stat().st_size
    assert f"generation_config.json: {size} bytes, and 7 could be read; did it change?" in said
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize(
    "parameter",
    [
        "embed_tokens.weight",
        "lm_head.weight",
        "norm.weight",
        "layers.1.input_layernorm.weight",
        "layers.0.block_sparse_moe.gate.weight",
        "layers.1.block_sparse_moe.experts.2.w2.weight",
        "layers.0.self_attn.o_proj.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(run: Run, tmp_path: Path, parameter: str) -> None:
    damaged = model()
    with torch.no_grad():
        dict(damaged.named_parameters())[parameter].view(-1)[-1] = float("nan")
    save_hf(damaged, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.model").write_text("a tokenizer")
    said = one_line(run(source=tmp_path / "damaged"))
    assert parameter.removesuffix(".weight") in said and "not finite numbers; the source is damaged" in said
    assert not (tmp_path / "out" / "config.json").exists()


def test_weights_beyond_the_outputs_dtype_are_named() -> None:
    large = torch.tensor([1e6])
    with pytest.raises(ModelError, match=r"norm\.weight: has weights too large for float16"):
        converted("norm.weight", large, torch.float16)
    assert converted("norm.weight", large, torch.bfloat16).item() == 999424


def test_another_tokenizer(run: Run, source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    said = one_line(run("--tokenizer", str(other)))
    assert f"{other}: holds no tokenizer.model" in said and not out.exists()
    (other / "spm.model").write_text("a tokenizer")
    (other / "generation_config.json").write_text("{}")
    assert run("--tokenizer", str(other / "spm.model"))[0] == 0
    assert contents(out) == whole | {"tokenizer.model": b"a tokenizer"}
    (other / "tokenizer.model").write_text("another")
    (other / "added_tokens.json").write_text("{}")
    assert run("--force", "--tokenizer", str(other))[0] == 0
    record = json.loads((out / "quantization.json").read_text())
    assert sorted(record["files"]) == sorted(contents(out))
    assert (out / "tokenizer.model").read_text() == "another"
    assert (out / "generation_config.json").read_bytes() == whole["generation_config.json"]
    assert (out / "added_tokens.json").exists() and not (out / "tokenizer_config.json").exists()


def test_a_tokenizer_that_is_none_is_named_before_a_weight_is_read(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointed = tmp_path / source.name
    shutil.copytree(source, pointed)
    (pointed / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    monkeypatch.setattr(quantize, "write_output", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    status, _, err = run(source=pointed)
    assert status == 130 and err.startswith("warning: ") and "is a Git LFS pointer" in err
    assert "or name another by --tokenizer: without one the output generates no text" in err
    status, _, err = run("--tokenizer", str(source), source=pointed)
    assert status == 130 and "warning" not in err


def test_what_goes_along(tmp_path: Path) -> None:
    names = [*COPIED, "tokenizer.model.v3", "tokenizer.model.v3.part", "tokenizer.model.\n", "other.json"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "tokenizer.model.v4").mkdir()
    assert sorted(copied_from(tmp_path)) == sorted([*COPIED, "tokenizer.model.v3"])


def test_a_run_goes_on_with_another_tokenizer(
    run: Run, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.model", "added_tokens.json"):
        (other / name).write_text("another")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("--tokenizer", str(other))[0] == 130  # all is written
    assert run()[0] == 0
    assert contents(tmp_path / "out") == whole


def test_a_lock_file_that_cannot_be_removed_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **words: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Read-only"), locked(tmp_path):
        patch.setattr(Path, "unlink", refuse)
    with locked(tmp_path):
        pass
