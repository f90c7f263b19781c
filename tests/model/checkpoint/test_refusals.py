"""What cannot be loaded is refused before any weight is read, in one line naming file, tensor and number."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.checkpoint import open_checkpoint, save_hf
from model.checkpoint import pieces as layout
from model.checkpoint.names import SPELLINGS, stored_tensors
from model.errors import ModelError
from model.mixtral import Mixtral
from model.parameters import copies
from tests.model.checkpoint.conftest import TINY, random_model, read_index

UP = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value).replace(str(folder), "")) < 330
    return str(error.value)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = read_index(folder)
    edit(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_folders(tmp_path: Path, hf: Path) -> None:
    assert f"{tmp_path / 'nowhere'}: no such folder" in refusal(tmp_path / "nowhere")
    assert "model.safetensors: a file; a checkpoint is a folder" in refusal(hf / "model.safetensors")
    (tmp_path / "void").mkdir()
    assert f"{tmp_path / 'void'}: empty" in refusal(tmp_path / "void")
    (hf / "config.json").rename(hf / "other.json")
    assert "no config.json" in refusal(hf)


def test_no_weights(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    assert "no weights (model.safetensors or consolidated.safetensors" in refusal(hf)
    for number in range(5):
        (hf / f"pytorch_model-{number}.bin").touch()
    said = refusal(hf)
    assert "pytorch_model-0.bin" in said and "and 2 more" in said and "convert to safetensors" in said


def test_another_architecture(hf: Path) -> None:
    edit_config(hf, model_type="llama")
    assert "'llama'" in refusal(hf)


def test_missing_shards(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    assert f"1 of {len(shards)} shards missing ({shards[1].name!r})" in refusal(sharded)
    (sharded / "model.safetensors.index.json").unlink()  # their own numbers tell, too
    assert f"1 of {len(shards)} shards missing ({shards[1].name!r})" in refusal(sharded)


def test_numbered_shards_need_no_index_and_must_be_of_one_export(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(sharded)
    checkpoint.load(Mixtral(checkpoint.config))
    (sharded / "model-00001-of-00002.safetensors").touch()
    assert "different exports" in refusal(sharded)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "x.bin", 3, None]
)
def test_an_index_cannot_point_elsewhere(sharded: Path, name: object) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({UP: name}))  # type: ignore[dict-item]
    said = refusal(sharded)
    assert "model.safetensors.index.json" in said and repr(UP) in said and "not a file name" in said


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 10**5]
)
def test_damaged_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    said = refusal(sharded)
    assert re.search(f"tensor '.*' is in {first.name} and again in {second.name}", said)


def test_missing_and_unexpected_tensors(rewrite: Callable[..., Path]) -> None:
    folder = rewrite({UP: None, "model.norm.weight": None})
    said = refusal(folder)
    assert (
        "2 tensors missing" in said and UP in said and "'model.norm.weight'" in said and str(folder) in said
    )
    rewrite(
        {
            UP: torch.zeros(TINY.ffn, TINY.hidden),
            "model.norm.weight": torch.zeros(TINY.hidden),
            "x.bias": torch.ones(1),
        }
    )
    said = refusal(folder)
    assert "1 tensor unexpected ('x.bias')" in said and "tensors missing" not in said


def test_many_names_are_cut_short(hf: Path) -> None:
    edit_config(hf, num_hidden_layers=40)
    assert "tensors missing ('model.layers.2.input_layernorm.weight', " in refusal(hf)
    assert f"and {38 * (7 + 9) - 3} more" in refusal(hf)
    edit_config(hf, num_hidden_layers=1)
    assert f"{7 + 9} tensors unexpected" in refusal(hf)
    edit_config(hf, num_hidden_layers=1_000_000_000)
    assert "layers is 1000000000, and must be at most 4096" in refusal(hf)


def test_a_claim_of_millions_of_tensors_is_refused_by_arithmetic(
    hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(hf, num_hidden_layers=4096, num_local_experts=256)
    monkeypatch.setattr(layout, "stored_tensors", pytest.fail)  # it would spell out every name
    held, expected = 3 + 2 * (7 + 9), 3 + 4096 * (7 + 3 * 256)
    assert f"holds {held} tensors, and the configuration's 4096 layers of 256 experts are {expected};" in (
        refusal(hf)
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_arithmetic_is_that_of_the_tables(spelling: str) -> None:
    table = SPELLINGS[spelling]
    counted = sum(copies(source, TINY) for sources in table.values() for source in sources)
    assert counted == len(stored_tensors(table, TINY))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "not one ('adapter_config.json'); merge it",
        ),
        (["model.Q4_K_M.gguf", "config.json"], "in GGUF ('model.Q4_K_M.gguf'); convert it with python -m"),
        (["\x1b[2J.GGUF"], r"GGUF ('\x1b[2J.GGUF')"),
        (["output-00001-of-00002.safetensors", "config.json"], "quantized by ExLlama ('output-00001-of-"),
        (["qmodel.pt", "config.json"], "by HQQ, in a pickle, which runs code when opened and is never read"),
        (["openvino_model.bin", "openvino_model.xml"], "OpenVINO's ('openvino_model.bin'); start from"),
    ],
)
def test_folders_of_other_programs_are_named(tmp_path: Path, files: list[str], said: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    assert said in refusal(folder)
    if files[0].lower().endswith(".gguf"):
        assert f"a GGUF file; convert it with python -m tools.quantize {folder}" in refusal(folder / files[0])


def test_what_is_read_here_counts_before_what_is_not(hf: Path) -> None:
    for name in ("model.gguf", "qmodel.pt", "adapter_config.json", "pytorch_model.bin"):
        (hf / name).write_text("{}")
    assert open_checkpoint(hf).files == 1


def test_a_pointer_is_not_the_file(hf: Path) -> None:
    (hf / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "a Git LFS pointer (56 bytes), not the file; run git lfs pull" in refusal(hf)


@pytest.mark.parametrize(
    ("tensor", "who"),
    [
        ("model.layers.0.block_sparse_moe.experts.0.w1.qweight", "GPTQ or AWQ"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.block_sparse_moe.switch_mlp.up_proj.scales", "MLX"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "FP8"),
    ],
)
def test_tensors_of_other_programs_are_named(rewrite: Callable[..., Path], tensor: str, who: str) -> None:
    said = refusal(rewrite({tensor: torch.zeros(2)}))
    assert who in said and repr(tensor) in said
    assert "start from the 16-bit checkpoint, and quantize it with tools.quantize" in said


@pytest.mark.parametrize("tensor", ["w1.W_q", "model.layers.0.self_attn.q_proj.W_q"])
def test_tensors_that_can_be_converted(rewrite: Callable[..., Path], tensor: str) -> None:
    folder = rewrite({tensor: torch.zeros(2)})
    assert f"by HQQ (tensor {tensor!r}); convert it with python -m tools.quantize {folder} OUT" in (
        refusal(folder)
    )


def test_the_same_name_in_many_files_does_not_hide_who_made_them(hf: Path) -> None:
    """One file for each expert, in each of which names are the same."""
    (hf / "model.safetensors").rename(hf / "trunk.safetensors")
    for e in range(2):
        save_file({"w1.W_q": torch.zeros(1)}, hf / f"{e}.safetensors")
    weight_map = {"a": "trunk.safetensors", "b": "0.safetensors", "c": "1.safetensors"}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "were quantized by HQQ (tensor 'w1.W_q')" in refusal(hf)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "\x1b[2J" + "y" * 10**6, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["\x1b[2J\n" * 10**5], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["\x1b[2J\n" * 10**5]},
        {"dtype": "F32", "shape": [10**17] * 60, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 60, "data_offsets": [0, 8]},
        {},
    ],
)
def test_what_a_header_says_is_shown_escaped_and_cut(hf: Path, entry: dict[str, object]) -> None:
    name = "\x1b[2J\n" + "x" * 10**6
    text = json.dumps({name: entry}).encode()
    (hf / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    said = refusal(hf)
    assert said.isprintable() and r"tensor '\x1b[2J\nxx" in said


def test_what_an_index_says_is_shown_escaped_and_cut(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"\x1b[2J\n" + "x" * 10**6: "\n" * 10**6}))
    assert refusal(sharded).isprintable()
    edit_index(sharded, lambda weight_map: weight_map.clear())
    edit_index(sharded, lambda weight_map: weight_map.update({"a": "x" * 10**5 + ".safetensors"}))
    assert "not a file name" in refusal(sharded)


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    assert "cannot be read (File name too long)" in refusal(tmp_path / ("x" * 300))
    assert "no such folder" in refusal(tmp_path / "a\0b")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "no such folder" in refusal(tmp_path / "loop")


def test_foreign_tensors(rewrite: Callable[..., Path]) -> None:
    folder = rewrite({})
    save_file({"transformer.h.0.weight": torch.ones(1)}, folder / "model.safetensors")
    assert "1 tensor unexpected ('transformer.h.0.weight')" in refusal(folder)


def test_wrong_shape(rewrite: Callable[..., Path]) -> None:
    said = refusal(rewrite({UP: torch.zeros(TINY.hidden, TINY.ffn)}))
    assert f"tensor {UP!r} has shape [24, 20], and must have [20, 24]" in said and "model.safetensors" in said


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8"), (torch.float64, "F64")],
)
def test_wrong_dtype(rewrite: Callable[..., Path], dtype: torch.dtype, name: str) -> None:
    said = refusal(rewrite({UP: torch.zeros(TINY.ffn, TINY.hidden).to(dtype)}))
    assert f"tensor {UP!r} is {name}, and weights must be BF16, F16, F32; start from the 16-bit" in said


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    said = refusal(sharded)
    assert shard.name in said and "the last 1000 bytes are missing; download it again" in said


@given(st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_never_loads_as_something_else(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed in the header: refused, or every parameter is what it was."""
    folder = tmp_path / "fuzz"
    original = random_model()
    if not folder.exists():
        save_hf(original, folder, torch.float32)
        (folder / "whole").write_bytes((folder / "model.safetensors").read_bytes())
    content = bytearray((folder / "whole").read_bytes())
    header = int.from_bytes(content[:8], "little")
    text = bytes(content[8 : 8 + header]).rstrip()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 7) | st.integers(8, 8 + len(text) - 1))
        content[place] = data.draw(st.sampled_from(b'0123456789,:[]{}"FB ') | st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    (folder / "model.safetensors").write_bytes(content[:cut])
    try:
        checkpoint = open_checkpoint(folder)
        loaded = Mixtral(checkpoint.config)
        checkpoint.load(loaded)
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        for ours, theirs in zip(loaded.parameters(), original.parameters(), strict=True):
            assert torch.equal(ours, theirs)
