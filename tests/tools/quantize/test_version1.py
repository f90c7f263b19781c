"""Checkpoints of format version 1 are converted without changing a bit of a weight."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import open_checkpoint
from model.checkpoint.safetensors import read_header
from model.config import ModelConfig
from model.errors import ModelError
from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from model.quant.tensor import QuantizedTensor
from model.shapes import MIXTRAL_8X7B
from tests.model.checkpoint.conftest import read_all
from tests.tools.quantize.test_quantize import contents, fail_at, one_line
from tests.tools.quantize.version1 import SIXTEEN, Spec, write_version1
from tools.quantize import command, output
from tools.quantize.journal import NAME as JOURNAL
from tools.quantize.version1 import kept

EVEN = ModelConfig(
    vocab=48, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=256, experts=2, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5, eos_ids=(2, 7),
)  # fmt: skip
ODD = replace(EVEN, hidden=96, heads=6, head_dim=16, ffn=160, layers=1)
LAST = "model-00003-of-00003.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_version1(tmp_path / "source", EVEN, (4, 64, 256), (3, 32, 16))
    return tmp_path / "source"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*flags: str) -> tuple[int, str, str]:
        words = [str(tmp_path / "source"), str(tmp_path / "out"), "--quiet", "--threads", "1", *flags]
        status = command.main(words)
        return (status, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("config", "attention", "experts", "expected"),
    [
        (EVEN, (4, 64, 256), (3, 32, 16), "4g64m2 3g32m4"),
        (EVEN, (2, 16, 128), (8, 64, 32), "2g16m8 8g64m2"),
        (EVEN, (3, 128, 16), (3, 128, 4096), "3g128m1 3g128m1"),
        (ODD, (8, 32, 64), (2, 16, 16), "8g32m1 2g16m2"),
        (ODD, SIXTEEN, (4, 32, 16), "16 4g32m1"),
        (ODD, (4, 32, 64), SIXTEEN, "4g32m1 16"),
    ],
)
def test_every_weight_is_the_same_number(
    run: Run, tmp_path: Path, config: ModelConfig, attention: Spec, experts: Spec, expected: str
) -> None:
    weights = write_version1(tmp_path / "source", config, attention, experts)
    assert run()[0] == 0
    formats = Formats(*map(QuantSpec.parse, expected.split()))
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.config, checkpoint.formats) == (config, formats)
    stored = read_all(tmp_path / "out")
    for name, weight in weights.items():
        matrix = name.removesuffix(".weight")
        if name in stored:
            found = stored.pop(name).float()
        else:
            spec = formats.experts if "experts" in name else formats.attention
            streams = {key: stored.pop(key) for key in list(stored) if key.startswith(matrix + ".")}
            streams = {key.rpartition(".")[2]: tensor for key, tensor in streams.items()}
            found = QuantizedTensor.of(spec, (weight.shape[0], weight.shape[1]), streams).dequantize()
        assert torch.equal(found.view(torch.int32), torch.from_numpy(weight).view(torch.int32)), name
    assert stored == {}


def test_what_goes_along(run: Run, source: Path, tmp_path: Path) -> None:
    status, printed, err = run("--json")
    assert (status, err) == (0, "")
    report, before = json.loads(printed), json.loads((source / "quantization.json").read_text())
    assert report == json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert report["errors"] == before["errors"] and len(report["errors"]) == 2 * (2 + 2 * 2)
    assert report["source"] == "a-mixtral" and report["head"]["bits"] == 16
    assert sorted(report["files"]) == sorted(contents(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"a tokenizer"
    source.rename(tmp_path / "before")
    (tmp_path / "out").rename(source)
    assert "quantized already (native, 3 files" in one_line(run())


@pytest.mark.parametrize("record", [None, "{", '{"errors": {"a": "b"}}', '{"errors": {"o_proj": 0.5}}'])
def test_a_source_without_errors(run: Run, source: Path, tmp_path: Path, record: str | None) -> None:
    path = source / "quantization.json"
    path.unlink()
    if record:
        path.write_text(record)
    status, printed, err = run()
    assert status == 0 and printed.count("\n") == 1 and "head 16" in printed
    assert ("quantization.json: damaged; the output records no errors" in err) == (
        record is not None and "0.5" not in record
    )
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["errors"] == {}


@pytest.mark.parametrize("number", [2, 9, 30, 50])
def test_killed_and_resumed(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    assert run()[0] == 0
    out = tmp_path / "out"
    whole = contents(out)
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        fail_at(number, KeyboardInterrupt(), patch)
        assert run()[0] == 130
    assert (out / JOURNAL).is_file() and not (out / "config.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert bool(finished) == (number > 3)
    (out / (LAST + ".part")).write_bytes(b"half")
    assert run()[0] == 0
    assert contents(out) == whole
    assert all((out / name).stat().st_mtime_ns == time for name, time in finished.items())


def test_a_finished_output_and_a_full_disk(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "are to be written and 1.0 kB are free" in one_line(run())
    assert run()[0] == 0
    assert "holds a finished checkpoint" in one_line(run())
    assert run("--force")[0] == 0


def test_flags_that_a_conversion_does_not_have(run: Run, source: Path, tmp_path: Path) -> None:
    said = one_line(run("--experts", "4", "--head", "8"))
    assert "source: of version 1, which is converted as it is; leave out --experts and --head, or " in said
    for flags in (["--attention", "4"], ["--head", "16"], ["--device", "cpu"]):
        assert f"leave out {flags[0]}, or start from 16 bits" in one_line(run(*flags))
    assert not (tmp_path / "out").exists()


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], **said: str) -> None:
    """Change the tensors and the metadata of the last file."""
    tensors, metadata = load_file(folder / LAST), dict(read_header(folder / LAST).metadata)
    change(tensors)
    save_file(tensors, folder / LAST, metadata | said)


O = "layers.1.self_attn.o_proj."  # noqa: E741


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / LAST).unlink(), "1 of 3 shards missing"),
        (lambda f: (f / LAST).write_bytes((f / LAST).read_bytes()[:-1]), "the last 1 bytes are missing"),
        (lambda f: (f / LAST).write_bytes(b""), "too short for a safetensors file"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: edit(f, lambda q: q.update(source=3)), "source is 3, and must be a text"),
        (lambda f: edit(f, lambda q: q.update(experts=4)), "experts is 4, and must be an object"),
        (lambda f: edit(f, lambda q: q["experts"].update(bits=5)), "5 bits per weight are not supported"),
        (
            lambda f: edit(f, lambda q: q["experts"].update(meta_group_size=32)),
            "metadata says experts '3g32m16'",
        ),
        (lambda f: rewrite(f, lambda t: None, source="another"), "its metadata says source 'another'"),
        (lambda f: rewrite(f, lambda t: None, version="2"), "its metadata says version '2'"),
        (lambda f: rewrite(f, lambda t: t.pop(O + "zeros")), "1 tensor missing"),
        (lambda f: rewrite(f, lambda t: t.update(more=torch.zeros(1))), "1 tensor unexpected ('more')"),
        (
            lambda f: rewrite(f, lambda t: t.update({O + "steps": torch.zeros(5)})),
            "o_proj.steps' has shape [5], and must have [4]",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({O + "steps": torch.zeros(4).int()})),
            "o_proj.steps' is I32, and it must be F32",
        ),
        (
            lambda f: rewrite(f, lambda t: t[O + "steps"].fill_(torch.inf)),
            "layers.1.self_attn.o_proj: has steps that are not finite numbers; the source is damaged",
        ),
        (
            lambda f: rewrite(f, lambda t: t["layers.1.input_layernorm.weight"].fill_(torch.nan)),
            "layers.1.input_layernorm.weight: has weights that are not finite numbers",
        ),
        (
            lambda f: rewrite(
                f, lambda t: t.update({n: w.half() for n, w in t.items() if w.dtype == torch.bfloat16})
            ),
            "and others are",
        ),
    ],
)
def test_a_damaged_source(
    run: Run, source: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(source)
    assert said in one_line(run())
    assert not (tmp_path / "out" / "config.json").exists()


def test_matrices_that_version_2_cannot_store(run: Run, tmp_path: Path) -> None:
    config = replace(ODD, ffn=144)  # groups of 16 divide it, and words of single bits do not
    write_version1(tmp_path / "source", config, SIXTEEN, (4, 16, 16))
    assert "w2: 144 inputs are not a multiple of 32; quantize the 16-bit checkpoint again" in one_line(run())


def test_scales_per_step() -> None:
    assert kept("experts", QuantSpec(4), MIXTRAL_8X7B) == QuantSpec(4, 64, 32)
    assert kept("attention", QuantSpec(4), MIXTRAL_8X7B) == QuantSpec(4, 64, 64)
    with pytest.raises(ModelError, match="do not divide into groups"):
        kept("experts", QuantSpec(4, 4096), MIXTRAL_8X7B)


def test_the_command_is_what_loading_names(source: Path) -> None:
    with pytest.raises(ModelError, match=r"convert it with python -m tools\.quantize FOLDER OUT"):
        open_checkpoint(source)
