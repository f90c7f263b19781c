"""`tools.quantize` makes the same of a model however its exporter spelled it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import open_checkpoint, save_hf
from model.config import ModelConfig
from tests.model.checkpoint import test_load
from tests.model.checkpoint.conftest import random_model, read_all
from tools.quantize import command as quantize

SHAPE = ModelConfig(
    vocab=48, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=32, experts=3, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip


def write_mistral(hf: Path, folder: Path) -> None:
    test_load.write_mistral(hf, folder)


def write_stacked(hf: Path, folder: Path) -> None:
    """The same weights with all experts of a layer in two tensors, as Transformers 5 keeps them."""
    folder.mkdir()
    tensors = read_all(hf)
    for n in range(SHAPE.layers):
        moe = f"model.layers.{n}.block_sparse_moe."
        w1, w2, w3 = (
            [tensors.pop(f"{moe}experts.{e}.w{i}.weight") for e in range(SHAPE.experts)] for i in (1, 2, 3)
        )
        mlp = f"model.layers.{n}.mlp."
        tensors[f"{mlp}experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        )
        tensors[f"{mlp}experts.down_proj"] = torch.stack(w2)
        tensors[f"{mlp}gate.weight"] = tensors.pop(f"{moe}gate.weight")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((hf / "config.json").read_text())


@pytest.mark.parametrize(
    ("write", "spelling"), [(write_mistral, "Mistral"), (write_stacked, "HF, experts stacked")]
)
def test_other_spellings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Path], None], spelling: str
) -> None:
    monkeypatch.setattr(test_load, "TINY", SHAPE)
    hf = tmp_path / "hf"
    save_hf(random_model(SHAPE), hf, torch.float32)
    write(hf, tmp_path / "other")
    assert open_checkpoint(tmp_path / "other").description.startswith(spelling + ", ")
    made = {}
    for name, source in (("plain", hf), ("other", tmp_path / "other")):
        out = tmp_path / f"{name}-4"
        flags = ["--attention", "4g16", "--experts", "2", "--threads", "1", "--quiet"]
        assert quantize.main([str(source), str(out), *flags]) == 0
        made[name] = read_all(out)
    assert made["plain"].keys() == made["other"].keys()
    assert all(torch.equal(made["plain"][name], made["other"][name]) for name in made["plain"])
