"""mixtral-offloading's own checkpoint: read bit for bit, and quantized again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import open_checkpoint, save_hf
from model.config import ModelConfig
from model.errors import ModelError
from tests.model.checkpoint.conftest import random_model, read_all
from tests.tools.quantize.sources.offloading_writer import TRUNK, dequantized, write_offloading
from tools.quantize import command as quantize
from tools.quantize.sources.opening import open_path

SHAPE = ModelConfig(
    vocab=48, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=256, experts=3, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip
CPU = torch.device("cpu")
ATTENTION, EXPERTS = (4, 64, 64), (2, 16, 32)
EXPERT = "model.layers.0.block_sparse_moe.experts.0"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offloading") / "hf"
    save_hf(random_model(SHAPE), folder, torch.float32)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    write_offloading(original, tmp_path / "source", ATTENTION, EXPERTS)
    return tmp_path / "source"


@pytest.mark.parametrize("experts", [(2, 16, 32), (4, 32, 64), (8, 16, 16)])
def test_every_weight_to_the_bit(original: Path, tmp_path: Path, experts: tuple[int, int, int]) -> None:
    small = replace(SHAPE, hidden=64, ffn=64, head_dim=16, layers=1, experts=2)
    save_hf(random_model(small), tmp_path / "hf", torch.float32)
    write_offloading(tmp_path / "hf", tmp_path / "source", (4, 16, 16), experts)
    source = open_path(tmp_path / "source")
    for e in range(small.experts):
        name = f"model.layers.0.block_sparse_moe.experts.{e}"
        tensors = load_file(tmp_path / "source" / f"{name}.safetensors")
        by_matrix = {i: below(f"w{i}.", tensors) for i in (1, 2, 3)}
        w1, w3 = (dequantized(by_matrix[i], small.ffn, small.hidden) for i in (1, 3))
        w2 = dequantized(by_matrix[2], small.hidden, small.ffn)
        read = source.read(f"layers.0.block_sparse_moe.experts.{e}.w13.weight", CPU)
        assert torch.equal(read, torch.cat([w1, w3])) and read.dtype == torch.float16
        assert torch.equal(source.read(f"layers.0.block_sparse_moe.experts.{e}.w2.weight", CPU), w2)
    trunk = load_file(tmp_path / "source" / TRUNK)
    rows = []
    for part, heads in (("q", small.heads), ("k", small.kv_heads), ("v", small.kv_heads)):
        tensors = below(f"model.layers.0.self_attn.{part}_proj.", trunk)
        rows.append(dequantized(tensors, heads * small.head_dim, small.hidden))
    assert torch.equal(source.read("layers.0.self_attn.qkv_proj.weight", CPU), torch.cat(rows))
    for ours, theirs in (
        ("embed_tokens", "model.embed_tokens"),
        ("lm_head", "lm_head"),
        ("norm", "model.norm"),
    ):
        assert torch.equal(source.read(f"{ours}.weight", CPU), trunk[f"{theirs}.weight"])


def split_trunk(folder: Path, **again: torch.Tensor) -> None:
    """Move the codes of the trunk to a second file, which also gets the tensors `again`."""
    trunk = load_file(folder / TRUNK)
    moved = {name: tensor for name, tensor in trunk.items() if name.endswith("W_q")}
    save_file({name: tensor for name, tensor in trunk.items() if name not in moved}, folder / TRUNK)
    save_file(moved | again, folder / "model-second.safetensors")
    for name in moved:
        edit_index(folder, name, "model-second.safetensors")


def test_a_trunk_in_two_files(folder: Path) -> None:
    name = "layers.1.self_attn.qkv_proj.weight"
    whole = open_path(folder).read(name, CPU)
    split_trunk(folder)
    source = open_path(folder)
    assert torch.equal(source.read(name, CPU), whole)
    assert {path.name for path, _, _ in source.extents(name)} == {TRUNK, "model-second.safetensors"}


def below(start: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}


def test_it_is_near_the_original(original: Path, folder: Path) -> None:
    """Wrong rows or columns would make it unlike the weights that were quantized."""
    source, plain = open_path(folder), open_checkpoint(original)
    for name, most in (("self_attn.qkv_proj", 0.15), ("block_sparse_moe.experts.1.w2", 0.5)):
        weight = plain.read(f"layers.1.{name}.weight", CPU)
        assert (source.read(f"layers.1.{name}.weight", CPU) - weight).norm() < most * weight.norm()


@pytest.mark.parametrize("experts", ["4g32", "3g64"])
def test_quantized_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], experts: str
) -> None:
    out = tmp_path / "out"
    flags = ["--attention", "4g32", "--experts", experts, "--threads", "1", "--quiet"]
    assert quantize.main([str(folder), str(out), *flags]) == 0
    printed = capsys.readouterr()
    assert "holds no tokenizer.model" in printed.err and "--tokenizer" in printed.err
    assert "the source is lossy: mixtral-offloading's HQQ (attention 4, experts 2); errors" in printed.out
    assert "bits a weight before and" in printed.out and "adds these errors and saves nothing" in printed.out
    record = json.loads((out / "quantization.json").read_text())
    assert record["lossy"] == "mixtral-offloading's HQQ (attention 4, experts 2)"
    assert 2.5 < record["bits"]["experts"]["before"] < record["bits"]["experts"]["now"]
    source, made = open_path(folder), open_checkpoint(out)
    assert made.config == SHAPE
    assert source.dtype == torch.float16
    assert torch.equal(read_all(out)["embed_tokens.weight"], read_all(folder)["model.embed_tokens.weight"])


def test_the_engine_says_how_to_convert_it(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"quantized by HQQ .*; convert it with python -m tools\.quantize"):
        open_checkpoint(folder)


def edit_index(folder: Path, key: str, value: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in (index["weight_map"] | {key: value}).items() if v is not None}
    path.write_text(json.dumps(index))


def edit_expert(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"{EXPERT}.safetensors"
        tensors = load_file(path) | {key.replace("__", "."): t for key, t in changes.items()}
        save_file({key: t for key, t in tensors.items() if t is not None}, path)

    return apply


U8 = torch.uint8
REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (
        lambda f: split_trunk(f, **{"model.norm.weight": torch.ones(128).half()}),
        f"tensor 'model.norm.weight' is in model-second.safetensors and again in {TRUNK}",
    ),
    (lambda f: edit_index(f, f"{EXPERT}.w1.W_q", None), "experts.0 is in None, which is not there"),
    (lambda f: edit_index(f, f"{EXPERT}.w1.W_q", f"{EXPERT[:-1]}1.safetensors"), "two of 6 experts are in"),
    (edit_expert(w1__W_q=None), "1 tensor missing ('w1.W_q')"),
    (edit_expert(w4__W_q=torch.zeros(3, dtype=U8)), "1 tensor unexpected ('w4.W_q')"),
    (edit_expert(w1__W_q=torch.zeros(3, 5, dtype=U8)), "'w1' has 15 bytes of codes and 2048 zeros, which"),
    (edit_expert(w1__meta__zero_q=torch.zeros(0, dtype=U8)), "and 0 zeros, which make no matrix [256, 128]"),
    (edit_expert(w1__meta__zero_q=torch.zeros(1, 100, dtype=U8)), "and 100 zeros, which make no matrix"),
    (edit_expert(w1__W_q=torch.zeros(4, 2048, dtype=torch.int8)), "'w1.W_q' is I8 [4, 2048], and must be U8"),
    (edit_expert(w1__meta__scale_q=torch.zeros((), dtype=U8)), "'w1.meta.scale_q' is U8 [], and must be"),
    (edit_expert(w1__meta__scale_q=torch.zeros(32, 63, dtype=U8)), "U8 [32, 63], and must be U8 [32, 64]"),
    (edit_expert(w2__meta__meta_zero__zero=torch.zeros(1).half()), "is F16 [1], and must be F16 or F32 []"),
    (edit_expert(w2__meta__meta_scale__zero=torch.zeros(1, 64).double()), "is F64 [1, 64], and must be F16"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "line"), REFUSED, ids=[line[:30] for _, line in REFUSED])
def test_refused(folder: Path, damage: Callable[[Path], None], line: str) -> None:
    damage(folder)
    with pytest.raises(ModelError) as error:
        open_path(folder)
    assert line in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
