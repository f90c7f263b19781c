"""What hqq saves to safetensors: read bit for bit, and quantized again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.checkpoint import open_checkpoint, save_hf
from model.config import ModelConfig, to_hf
from model.errors import ModelError
from tests.model.checkpoint.conftest import random_model, read_all
from tools.quantize import command as quantize
from tools.quantize.sources.opening import open_path

SHAPE = ModelConfig(
    vocab=48, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=192, experts=3, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip
CPU = torch.device("cpu")
W1 = "model.layers.0.block_sparse_moe.experts.0.w1"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hqq") / "hf"
    save_hf(random_model(SHAPE), folder, torch.float32)
    return folder


def is_quantized(name: str) -> bool:
    return ".self_attn." in name or ".experts." in name


def save_by_hqq(
    original: Path, folder: Path, dtype: torch.dtype = torch.float16, **options: object
) -> dict[str, Tensor]:
    """Have hqq quantize the matrices and save the model. Returns the weights that hqq itself makes of them,
    by their names in HF's layout."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.base import BaseHQQModel

    settings = BaseQuantizeConfig(**({"nbits": 4, "group_size": 64, "axis": 1} | options))
    root, known = nn.Module(), {}
    for name, tensor in read_all(original).items():
        *path, last = name.removesuffix(".weight").split(".")
        parent: nn.Module = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if is_quantized(name):
            linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            linear.weight.data = tensor
            module = HQQLinear(linear, settings, compute_dtype=dtype, device="cpu")
            known[name] = module.dequantize()
        else:
            module = nn.Module()
            module.weight = nn.Parameter(tensor.to(dtype))
            known[name] = tensor.to(dtype)
        parent.add_module(last, module)
    root.config = SimpleNamespace(
        num_hidden_layers=SHAPE.layers,
        to_json_file=lambda path: Path(path).write_text(json.dumps(to_hf(SHAPE))),
    )
    BaseHQQModel.save_to_safetensors(root, str(folder), num_blocks_per_file=1)
    return known


def fused(known: dict[str, Tensor], *names: str) -> Tensor:
    return torch.cat([known[f"{name}.weight"] for name in names])


FORMATS = [
    *({"nbits": bits, "group_size": 64, "axis": axis} for bits in (8, 4, 3, 2, 1) for axis in (0, 1)),
    {"nbits": 3, "group_size": 16, "axis": 0},
    {"nbits": 2, "group_size": 16, "axis": 1},
    {"nbits": 4, "group_size": None, "axis": 1},
    {"nbits": 4, "group_size": 64, "axis": 1, "view_as_float": True},
    {"nbits": 3, "group_size": 64, "axis": 1, "view_as_float": True},
    # As many bytes as at 4 bits.
    *({"nbits": 3, "group_size": size, "axis": 0, "view_as_float": True} for size in (8, 16, 32)),
    *({"nbits": bits, "group_size": 16, "axis": 0, "view_as_float": True} for bits in (8, 4, 2, 1)),
]


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_weight_to_the_bit(original: Path, tmp_path: Path, options: dict[str, object]) -> None:
    known = save_by_hqq(original, tmp_path / "source", **options)
    source = open_path(tmp_path / "source")
    assert source.config == SHAPE and source.lossy == f"HQQ ({options['nbits']} bits)"
    for n in range(SHAPE.layers):
        at = f"model.layers.{n}."
        qkv = fused(known, *(f"{at}self_attn.{part}_proj" for part in "qkv"))
        assert torch.equal(source.read(f"layers.{n}.self_attn.qkv_proj.weight", CPU), qkv)
        for e in range(SHAPE.experts):
            expert = f"{at}block_sparse_moe.experts.{e}."
            made = source.read(f"layers.{n}.block_sparse_moe.experts.{e}.w13.weight", CPU)
            assert torch.equal(made, fused(known, f"{expert}w1", f"{expert}w3"))
            made = source.read(f"layers.{n}.block_sparse_moe.experts.{e}.w2.weight", CPU)
            assert torch.equal(made, known[f"{expert}w2.weight"])
        gate = source.read(f"layers.{n}.block_sparse_moe.gate.weight", CPU)
        assert torch.equal(gate, known[f"{at}block_sparse_moe.gate.weight"])
    assert torch.equal(source.read("lm_head.weight", CPU), known["lm_head.weight"])


@pytest.mark.parametrize("bits", [3, 4])
def test_bytes_called_float32(original: Path, tmp_path: Path, bits: int) -> None:
    known = save_by_hqq(
        original, tmp_path / "source", torch.float32, nbits=bits, group_size=16, axis=0, view_as_float=True
    )
    made = open_path(tmp_path / "source").read("layers.1.self_attn.o_proj.weight", CPU)
    assert torch.equal(made, known["model.layers.1.self_attn.o_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes(original: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    known = save_by_hqq(original, tmp_path / "source", dtype)
    source = open_path(tmp_path / "source")
    made = source.read("layers.1.self_attn.o_proj.weight", CPU)
    assert made.dtype == dtype and torch.equal(made, known["model.layers.1.self_attn.o_proj.weight"])
    assert source.dtype == torch.bfloat16 and source.gates == dtype


def test_a_note_of_transformers_changes_nothing(original: Path, tmp_path: Path) -> None:
    save_by_hqq(original, tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    noted = json.loads(config.read_text()) | {
        "quantization_config": {"quant_method": "hqq", "skip_modules": []}
    }
    config.write_text(json.dumps(noted))
    assert open_path(tmp_path / "source").config == SHAPE
    with pytest.raises(ModelError, match=r"by 'hqq'; convert it with python -m tools\.quantize FOLDER OUT"):
        open_checkpoint(tmp_path / "source")


@pytest.mark.parametrize("experts", ["4g64", "3g64"])
def test_quantized_again(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], experts: str
) -> None:
    save_by_hqq(original, tmp_path / "source")
    out = tmp_path / "out"
    flags = ["--attention", "4g32", "--experts", experts, "--threads", "1", "--quiet"]
    assert quantize.main([str(tmp_path / "source"), str(out), *flags]) == 0
    printed = capsys.readouterr().out
    assert "the source is lossy: HQQ (4 bits); errors are against its weights" in printed
    record = json.loads((out / "quantization.json").read_text())
    bits = record["bits"]["experts"]
    assert 4.5 <= bits["before"] < 4.6
    assert open_checkpoint(out).config == SHAPE
    error = record["errors"]["layers.0.block_sparse_moe.experts.0.w2"]
    assert 0.01 < error < (0.1 if experts == "4g64" else 0.25)


def edit(**changes: Tensor | None) -> Callable[[Path], None]:
    """Other tensors of a module, by what their names end with."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for ending, tensor in changes.items():
            path = folder / index["weight_map"].get(f"{W1}.{ending}", index["weight_map"][f"{W1}.W_q"])
            tensors = load_file(path)
            tensors.pop(f"{W1}.{ending}", None)
            save_file(tensors | ({} if tensor is None else {f"{W1}.{ending}": tensor}), path)

    return apply


def test_bits_that_shapes_do_not_tell(original: Path, tmp_path: Path) -> None:
    save_by_hqq(original, tmp_path / "source")
    edit(nbits=torch.tensor(8, dtype=torch.int32))(tmp_path / "source")
    with pytest.raises(ModelError, match="has 4 bits by its shapes and 8 by its nbits; download it again"):
        open_path(tmp_path / "source").read("layers.0.block_sparse_moe.experts.0.w13.weight", CPU)


U8 = torch.uint8
REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (edit(scale=None), f"1 tensor missing ('{W1}.scale')"),
    (edit(nbits=None), f"1 tensor missing ('{W1}.nbits')"),
    (edit(nbits=torch.tensor([4])), "nbits I64 [1], which make no"),
    (edit(bias=torch.zeros(192)), f"1 tensor unexpected ('{W1}.bias')"),
    (edit(zero_scale=torch.zeros(2, 8)), f"1 tensor unexpected ('{W1}.zero_scale')"),
    (edit(W_q=torch.zeros(191, 64, dtype=U8)), "U8 [191, 64], scale F16 [384, 1], zero F16 [384, 1], nbits"),
    (edit(W_q=torch.zeros(0, dtype=U8)), "W_q U8 [0], "),
    (edit(W_q=torch.zeros((), dtype=U8)), "W_q U8 [], "),
    (edit(W_q=torch.zeros(192 * 64, dtype=U8)), "W_q U8 [12288], "),
    (edit(W_q=torch.zeros(64, 192, dtype=U8)), "W_q U8 [64, 192], "),
    (edit(scale=torch.zeros(384).half()), "scale F16 [384], "),
    (edit(scale=torch.zeros(383, 1).half()), "scale F16 [383, 1], "),
    (edit(zero=torch.zeros(384, 1)), "zero F32 [384, 1], nbits I32 [], which make no [192, 128]"),
    (edit(scale=torch.zeros(384, 1, dtype=torch.int8)), "scale I8 [384, 1], "),
    (edit(W_q=torch.zeros(192, 64, dtype=torch.int64)), "W_q I64 [192, 64], "),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "line"), REFUSED, ids=[line[-40:] for _, line in REFUSED])
def test_refused(original: Path, tmp_path: Path, damage: Callable[[Path], None], line: str) -> None:
    folder = tmp_path / "source"
    save_by_hqq(original, folder)
    damage(folder)
    with pytest.raises(ModelError) as error:
        open_path(folder)
    assert line in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
