"""A model's digest changes with each of its weights' tensors, and not with how its files are cut."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import identify, open_checkpoint, save_hf
from model.checkpoint.identity import SAMPLES, middle, sampled
from model.checkpoint.names import Rows
from model.checkpoint.pieces import Piece
from model.errors import ModelError
from model.parameters import instances, parameter_rows
from tests.model.checkpoint.conftest import TINY, random_model, read_all


def digest(folder: Path) -> str:
    return identify(open_checkpoint(folder), "any").digest


def test_it_does_not_depend_on_the_files(hf: Path, sharded: Path, tmp_path: Path) -> None:
    assert digest(hf) == digest(sharded) == digest(shutil.copytree(hf, tmp_path / "copy"))
    assert identify(open_checkpoint(hf), "mine").name == "mine"


def test_every_tensor_counts(hf: Path, rewrite: Callable[[Mapping[str, Tensor | None]], Path]) -> None:
    tensors = read_all(hf)
    seen = {digest(hf)}
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[tensor.numel() // 2] += 1e-4
        seen.add(digest(rewrite({name: changed})))
        save_file(tensors, hf / "model.safetensors")
    assert len(seen) == len(tensors) + 1


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"eos_token_id": [2, 3]}, True),
        ({"max_position_embeddings": 32}, True),
        ({"rope_theta": 2e4}, False),
        ({"rms_norm_eps": 1e-6}, False),
        ({"num_experts_per_tok": 1}, False),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, False),
    ],
)
def test_of_the_configuration_what_changes_keys_and_values_counts(
    hf: Path, change: dict[str, object], same: bool
) -> None:
    before = digest(hf)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | change))
    assert (digest(hf) == before) is same


def test_the_dtype_counts(hf: Path, tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path / "half", torch.bfloat16)
    assert digest(tmp_path / "half") != digest(hf)


def test_of_a_large_model_every_kind_and_every_layer_is_sampled() -> None:
    config = replace(TINY, layers=32, experts=8)
    rows = parameter_rows(config)
    pieces = [
        Piece(Path("f"), t, 0, torch.bfloat16, Rows(t.format(n=n, e=e), 0, (64 if "norm" in t else 1 << 20,)))
        for t, n, e in instances(config)
    ]
    large = [piece for piece in sampled(pieces) if "norm" not in piece.tensor]
    assert len(large) == SAMPLES
    kinds = {piece.tensor for piece in large}
    assert {t for t in rows if "{n}" in t and "norm" not in t} <= kinds
    names = [piece.rows.parameter for piece in large]
    assert {n for n in range(32) if any(f"layers.{n}." in name for name in names)} == {*range(32)}


def test_of_a_large_tensor_the_middle_is_read(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(100) + bytes(300_000) + b"x" * 4096 + bytes(300_000))
    piece = Piece(file, "t", 100, torch.uint8, Rows("p", 0, (604_096,)), exact=True)
    assert middle(piece) == b"x" * 4096
    file.write_bytes(bytes(1000))
    with pytest.raises(ModelError, match="f: ended early, in tensor 't'"):
        middle(piece)
    file.unlink()
    with pytest.raises(ModelError, match="f: tensor 't' cannot be read"):
        middle(piece)
