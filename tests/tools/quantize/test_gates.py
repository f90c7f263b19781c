"""Gates of routers keep the precision of the source, and everything else is as if they had no say."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import open_checkpoint, save_hf
from model.checkpoint.safetensors import read_header
from model.errors import ModelError
from model.mixtral import Mixtral
from tests.model.checkpoint.conftest import read_all
from tests.tools.quantize.test_quantize import SHAPE, contents, fail_at, model
from tools.quantize import command as quantize

GATES = [f"layers.{layer}.block_sparse_moe.gate.weight" for layer in range(SHAPE.layers)]
FORMATS = ["--experts", "3g32", "--quiet", "--threads", "1", "--device", "cpu"]
PLAIN = ["--attention", "16", "--experts", "16", "--head", "16", *FORMATS[2:]]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
IDS = torch.tensor([[1, 7, 30, 42, 9, 9, 12, 55, 3]])


def source(folder: Path, dtype: torch.dtype, gates: Mapping[str, torch.dtype] | torch.dtype) -> Path:
    """A checkpoint in `dtype`, whose gates are in a dtype of their own."""
    made = model()
    save_hf(made, folder, dtype)
    tensors = load_file(folder / "model.safetensors")
    for name, parameter in made.named_parameters():
        if name in GATES:
            own = gates if isinstance(gates, torch.dtype) else gates[name]
            tensors[f"model.{name}"] = (parameter.detach() * 8).to(own)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    return folder


def quantized(folder: Path, out: Path, flags: list[str] = FORMATS) -> Path:
    assert quantize.main([str(folder), str(out), *flags]) == 0
    return out


def loaded(folder: Path) -> Mixtral:
    checkpoint = open_checkpoint(folder)
    made = Mixtral(checkpoint.config).requires_grad_(False)
    checkpoint.load(made)
    return made


@pytest.mark.parametrize("gates", [F32, F16, BF16])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_what_is_written(tmp_path: Path, dtype: torch.dtype, gates: torch.dtype) -> None:
    folder = source(tmp_path / "source", dtype, gates)
    out = quantized(folder, tmp_path / "out")
    others = BF16 if dtype == F32 else dtype
    theirs, ours = read_all(folder), read_all(out)
    for name, tensor in ours.items():
        if name in GATES:
            assert tensor.dtype == gates and torch.equal(tensor, theirs[f"model.{name}"])
        elif name.endswith(".weight"):
            assert tensor.dtype == others
    said = {} if gates == others else {"gates": str(gates).removeprefix("torch.")}
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == str(others).removeprefix("torch.")
    for where in (
        config["quantization_config"],
        *(read_header(path).metadata for path in out.glob("*.safetensors")),
    ):
        assert {key: value for key, value in where.items() if key == "gates"} == said
    checkpoint = open_checkpoint(out)
    assert (checkpoint.dtype, checkpoint.mappable) == (others, others)
    assert quantize.main(["--verify", str(out), "--quiet"]) == 0


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_only_gates_differ(tmp_path: Path, dtype: torch.dtype) -> None:
    """Whatever they are in, every other tensor has the bytes that it had."""
    wide = quantized(source(tmp_path / "wide", dtype, F32), tmp_path / "wide-out")
    plain = quantized(source(tmp_path / "plain", dtype, dtype), tmp_path / "plain-out")
    ours, expected = read_all(wide), read_all(plain)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        if name in GATES:
            assert torch.equal(ours[name].to(dtype), tensor) and not torch.equal(ours[name], tensor.float())
        else:
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)


def test_gates_of_several_dtypes(tmp_path: Path) -> None:
    """float32 has the numbers of them all."""
    folder = source(tmp_path / "source", BF16, dict(zip(GATES, [F16, BF16], strict=True)))
    ours, theirs = read_all(quantized(folder, tmp_path / "out")), read_all(folder)
    for name in GATES:
        assert ours[name].dtype == F32 and torch.equal(ours[name], theirs[f"model.{name}"].float())


@pytest.mark.parametrize("gates", [F32, F16, BF16])
def test_the_network_has_the_source_s_gates(tmp_path: Path, gates: torch.dtype) -> None:
    folder = source(tmp_path / "source", BF16, gates)
    mine = loaded(folder)
    assert torch.equal(loaded(quantized(folder, tmp_path / "out", PLAIN))(IDS), mine(IDS))
    for block in mine.blocks:
        block.block_sparse_moe.gate.weight.copy_(block.block_sparse_moe.gate.weight.bfloat16())
    assert torch.equal(mine(IDS), loaded(folder)(IDS)) == (gates == BF16), "gates would not matter"


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_checkpoint(folder)
    return str(error.value)


def rewrite(folder: Path, changes: Mapping[str, Tensor]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors, metadata = load_file(path), dict(read_header(path).metadata)
        save_file({name: changes.get(name, tensor) for name, tensor in tensors.items()}, path, metadata)


def test_what_is_not_as_it_says_is_refused(tmp_path: Path) -> None:
    wide = quantized(source(tmp_path / "source", BF16, F32), tmp_path / "out")
    stored = read_all(wide)
    for wrong in ("float64", "F32", 32, ["float32"], ""):
        edit(wide, lambda section, wrong=wrong: section.update(gates=wrong))
        assert "gates is " in refusal(wide) and "one of float32, float16, bfloat16" in refusal(wide)
    edit(wide, lambda section: section.update(gates="float16"))
    assert "says gates 'float32', and config.json says 'float16'" in refusal(wide)
    edit(wide, lambda section: section.pop("gates"))
    assert f"tensor '{GATES[0]}' is F32, and it must be BF16, F16; make it again" in refusal(wide)
    edit(wide, lambda section: section.update(gates="float32"))
    assert open_checkpoint(wide).native
    rewrite(wide, {GATES[1]: stored[GATES[1]].bfloat16()})
    assert f"tensor '{GATES[1]}' is BF16, and it must be F32; make it again" in refusal(wide)
    rewrite(wide, {GATES[1]: stored[GATES[1]], "norm.weight": stored["norm.weight"].float()})
    assert "tensor 'norm.weight' is F32, and it must be BF16, F16; make it again" in refusal(wide)


def test_gates_in_float64_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source(tmp_path / "source", BF16, torch.float64)
    assert quantize.main([str(folder), str(tmp_path / "out"), *FORMATS]) == 1
    err = capsys.readouterr().err
    assert f"tensor 'model.{GATES[0]}' is F64, and weights must be BF16, F16, F32" in err
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = source(tmp_path / "source", BF16, F32), tmp_path / "out"
    whole = contents(quantized(folder, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        fail_at(40, KeyboardInterrupt(), patch)
        assert quantize.main([str(folder), str(out), *FORMATS]) == 130
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert finished
    assert contents(quantized(folder, out)) == whole
    assert (
        finished.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}.items()
    )
