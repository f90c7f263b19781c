"""Native checkpoints: which byte is where, reading any part of one, and what is refused."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import Checkpoint, open_checkpoint, save_hf
from model.checkpoint import load as loading
from model.checkpoint import native as storage
from model.checkpoint.native import NativeFormat, native_shards, read_format
from model.checkpoint.safetensors import read_header
from model.checkpoint.writer import Writer
from model.config import ModelConfig, to_hf
from model.errors import ModelError
from model.quant.formats import PLAIN, Formats
from model.quant.size import model_size
from model.quant.spec import QuantSpec
from model.quant.streams import expert_fields, model_fields
from tests.model.checkpoint.conftest import TINY, random_model, read_all

SMALL = ModelConfig(
    vocab=48, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=256, experts=3, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip
EXPERT = "layers.1.block_sparse_moe.experts.2."
UP = EXPERT + "w13.scales"
MIXED = ["4 4 8", "16 2 16", "3 16 4g32", "16 16 16", "16 16 8", "8 3g128 3", "2g64 4g32m64 16"]


def write_native(folder: Path, formats: str = "4 3g128 8", config: ModelConfig = SMALL) -> Path:
    """A native checkpoint of random bytes: none of what is tested here minds what they mean."""
    native = NativeFormat(Formats(*map(QuantSpec.parse, formats.split())), "somewhere")
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for shard in native_shards(config, native.formats, torch.bfloat16):
        with Writer(folder / shard.name, shard.tensors, native.metadata()) as writer:
            for tensor in shard.tensors:
                values = torch.randint(0, 256, (tensor.bytes,), dtype=torch.uint8, generator=generator)
                writer.write(tensor.name, values.view(tensor.dtype).view(tensor.shape))
                weight_map[tensor.name] = shard.name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(to_hf(config) | {"quantization_config": native.section()}))
    return folder


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return write_native(tmp_path / "native")


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("formats", MIXED)
def test_files_are_what_the_arithmetic_says(tmp_path: Path, formats: str) -> None:
    folder = write_native(tmp_path / "native", formats)
    specs = Formats(*map(QuantSpec.parse, formats.split()))
    fields = list(model_fields(SMALL, specs))
    stored = read_all(folder)
    assert {f.name: (f.dtype, f.shape) for f in fields} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()
    }
    headers = {path: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    assert [name for header in headers.values() for name in header.tensors] == [f.name for f in fields]
    starts = [min(entry.offset for entry in header.tensors.values()) for header in headers.values()]
    total = model_size(SMALL, specs).total
    assert sum(path.stat().st_size for path in headers) == total + sum(starts)
    assert all(start % 4096 == 0 for start in starts)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.formats, checkpoint.native) == (specs, True)
    assert (checkpoint.bytes, checkpoint.dtype) == (total, torch.bfloat16)
    named = "attention {}, experts {}, head {}".format(*formats.split())
    assert checkpoint.description.startswith(f"native, 3 files, {named}, ")


@pytest.mark.parametrize("formats", MIXED)
def test_an_expert_is_one_byte_range_in_the_order_of_its_blob(tmp_path: Path, formats: str) -> None:
    folder = write_native(tmp_path / "native", formats)
    checkpoint = open_checkpoint(folder)
    path = folder / "model-00003-of-00003.safetensors"
    entries = read_header(path).tensors
    for e in range(SMALL.experts):
        fields = expert_fields(SMALL, checkpoint.formats.experts, f"layers.1.block_sparse_moe.experts.{e}.")
        start = entries[fields[0].name].offset
        assert start % 16 == 0
        for field in fields:
            assert (entries[field.name].offset, entries[field.name].bytes) == (
                start + field.offset,
                field.bytes,
            )
        blob = torch.zeros(fields[-1].end, dtype=torch.uint8)
        checkpoint.fill({field.name: field.view(blob) for field in fields})
        assert blob.numpy().tobytes() == path.read_bytes()[start : start + fields[-1].end]


def test_an_expert_of_a_plain_checkpoint_is_read_in_the_dtype_asked_for(hf: Path) -> None:
    checkpoint = open_checkpoint(hf)
    assert (checkpoint.formats, checkpoint.native) == (PLAIN, False)
    fields = expert_fields(TINY, checkpoint.formats.experts, EXPERT)
    blob = torch.zeros(fields[-1].end, dtype=torch.uint8)
    checkpoint.fill({field.name: field.view(blob) for field in fields})
    parameters = dict(random_model().named_parameters())
    for field in fields:
        assert torch.equal(field.view(blob), parameters[field.name].bfloat16())


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_can_be_read_in_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Some names or all, contiguous or not, in one piece or many, with threads of one's own or without."""
    folder = tmp_path / "native"
    stored = read_all(folder if folder.exists() else write_native(folder))
    monkeypatch.setattr(loading, "CHUNK_BYTES", data.draw(st.sampled_from([1 << 12, 1 << 15, 1 << 24])))
    names = data.draw(st.lists(st.sampled_from(sorted(stored)), unique=True, max_size=8) | st.just([*stored]))
    tensors = {}
    for name in names:
        tensors[name] = torch.zeros_like(stored[name])
        if stored[name].dim() > 1 and data.draw(st.booleans()):
            tensors[name] = torch.zeros_like(stored[name].mT.contiguous()).mT
    seen: list[int] = []
    if data.draw(st.booleans()):
        with ThreadPoolExecutor(3) as pool:
            open_checkpoint(folder).fill(tensors, seen.append, pool)
    else:
        open_checkpoint(folder).fill(tensors, seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())
    assert all(same(tensor.contiguous(), stored[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("x.codes", torch.zeros(1), "parameter 'x.codes' is only in the model"),
        (UP, torch.zeros(3, dtype=torch.uint8), r"is \[32, 1, 16\], and \[3\] in the model"),
        (UP, torch.zeros(32, 1, 16), "is torch.uint8 and not converted to torch.float32"),
        (
            EXPERT + "w2.steps",
            torch.zeros(8, 1, 16).double(),
            "is torch.float32 and not converted to torch.float64",
        ),
    ],
)
def test_what_cannot_be_filled(native: Path, name: str, tensor: Tensor, said: str) -> None:
    before = tensor.clone()
    with pytest.raises(ModelError, match=said):
        open_checkpoint(native).fill({"norm.weight": torch.zeros(128), name: tensor})
    assert torch.equal(tensor, before)


def test_a_part_of_a_file_that_has_been_cut_short(native: Path) -> None:
    checkpoint = open_checkpoint(native)
    path = native / "model-00003-of-00003.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 600)  # the last 512 are steps
    checkpoint.fill({"norm.weight": torch.zeros(128)})
    last = EXPERT + "w2.zeros"
    with pytest.raises(ModelError, match="early, in tensor"):
        checkpoint.fill({last: torch.zeros(checkpoint.layout.shapes[last], dtype=torch.uint8)})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value) and len(str(error.value).replace(str(folder), "")) < 330
    return str(error.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("quant_method", "gptq", "quantized by 'gptq'; start from the 16-bit checkpoint"),
        ("version", 3, "version 3, and this program reads version 2; make it again"),
        (
            "version",
            1,
            "version 1, and this program reads version 2; "
            "convert it with python -m tools.quantize FOLDER OUT",
        ),
        ("version", "1", "version is '1', and must be an integer"),
        ("version", None, "version is None"),
        ("source", 3, "source is 3, and must be a text"),
        ("source", "elsewhere", "its metadata says source 'somewhere', and config.json says 'elsewhere'"),
        ("attention", 4, "attention is 4, and must be an object"),
        ("attention", {"bits": 4}, "attention: group_size is None"),
        ("attention", {"bits": 5, "group_size": 64, "meta_group_size": 64}, "attention: 5 bits"),
        ("attention", {"bits": 4, "group_size": 0, "meta_group_size": 0}, "sizes are not written out"),
        ("head", None, "head: bits is None, and must be an integer"),
        ("head", [], "head: bits is None"),
        ("head", "8", "head is '8', and must be an object"),
        ("head", {"bits": 8, "group_size": 64}, "head: meta_group_size is None"),
        ("head", {"bits": 16, "group_size": 64, "meta_group_size": 0}, "head: 16 bits are not quantized"),
        ("head", {"bits": 4, "group_size": 64, "meta_group_size": 256}, "says head '8g64m256', and config"),
        ("experts", {"bits": 3, "group_size": 48, "meta_group_size": 128}, "48 is not a power of two"),
        ("experts", {"bits": 3, "group_size": 64, "meta_group_size": 128}, "says experts '3g128m128', and"),
        (
            "experts",
            {"bits": 10**400, "group_size": 64, "meta_group_size": 128},
            "a size is below 0 or above 4096",
        ),
        (
            "experts",
            {"bits": -(10**400), "group_size": 64, "meta_group_size": 128},
            "a size is below 0 or above",
        ),
        ("version", 10**400, "version 1000"),
    ],
)
def test_configurations_that_cannot_be_right(native: Path, key: str, value: object, said: str) -> None:
    edit(native, lambda config: config["quantization_config"].update({key: value}))
    assert said in refusal(native)


def test_a_configuration_of_another_size(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(native, lambda config: config.update(intermediate_size=512))
    assert "has shape [32, 8, 16, 4], and must have [64, 8, 16, 4]" in refusal(native)
    edit(native, lambda config: config.update(intermediate_size=192))
    assert "do not divide into groups of 128" in refusal(native)
    edit(native, lambda config: config.update(intermediate_size=256, num_local_experts=4))
    assert "tensors missing" in refusal(native)
    edit(native, lambda config: config.update(num_hidden_layers=4096, num_local_experts=256))
    monkeypatch.setattr(storage, "instances", pytest.fail)
    said = refusal(native)  # by arithmetic: no name of them is spelled out
    assert re.search(r"holds \d+ tensors, and the configuration's 4096 layers of 256 experts are", said)


def test_quantized_and_plain_are_not_taken_for_one_another(native: Path, hf: Path) -> None:
    assert read_format(hf) is None and read_format(native) is not None
    edit(native, lambda config: config.pop("quantization_config"))
    assert "quantized by tools.quantize, and config.json does not say so" in refusal(native)
    edit(hf, lambda config: config.update(quantization_config={"quant_method": "mixtral-runtime"}))
    assert "version is None" in refusal(hf)


def test_tampered_tensors(native: Path) -> None:
    path = native / "model-00003-of-00003.safetensors"
    tensors, metadata = load_file(path), dict(read_header(path).metadata)

    def saying(changes: dict[str, Tensor | None], **said: str) -> str:
        changed = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
        save_file(changed, path, {**metadata, **said})
        return refusal(native)

    assert f"1 tensor missing ('{UP}')" in saying({UP: None})
    assert "1 tensor unexpected ('x')" in saying({"x": torch.zeros(1)})
    assert f"tensor '{UP}' is I8, and it must be U8; make it again" in saying({UP: tensors[UP].char()})
    assert f"tensor '{UP}' has shape [512, 1], and must have [32, 1, 16]" in saying(
        {UP: tensors[UP].view(512, 1)}
    )
    gate = "layers.1.block_sparse_moe.gate.weight"
    assert f"tensor '{gate}' is U8, and it must be BF16, F16" in saying({gate: tensors[gate].byte()})
    assert "says attention '3', and config.json says '4g64m256'; the files belong to different" in saying(
        {}, attention="3"
    )
    save_file(tensors, path)
    assert "its metadata says format None" in refusal(native)
    save_file(tensors, path, metadata)  # in another order, which is a reader's business no more
    assert open_checkpoint(native).native


def test_a_model_of_plain_parameters_is_not_filled_from_streams(native: Path) -> None:
    from model.mixtral import Mixtral

    checkpoint = open_checkpoint(native)
    with pytest.raises(ModelError, match="is only in the checkpoint"):
        checkpoint.load(Mixtral(checkpoint.config))


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, Tensor]]:
    folder = write_native(tmp_path_factory.mktemp("fuzz") / "native")
    path = folder / "model-00002-of-00003.safetensors"
    return path, path.read_bytes(), read_all(folder)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_damaged_header_never_loads_as_something_else(
    opened: tuple[Path, bytes, dict[str, Tensor]], data: st.DataObject
) -> None:
    path, whole, stored = opened
    content = bytearray(whole)
    text = bytes(content[8 : 8 + int.from_bytes(content[:8], "little")]).rstrip()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 7) | st.integers(8, 8 + len(text) - 1))
        content[place] = data.draw(st.sampled_from(b'0123456789,:[]{}"FBU ') | st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    try:
        checkpoint: Checkpoint = open_checkpoint(path.parent)
    except ModelError as error:
        assert "\n" not in str(error)
        return
    loaded = {name: torch.zeros_like(tensor) for name, tensor in stored.items()}
    checkpoint.fill(loaded)
    for name in loaded:  # a dtype may have become another of two bytes
        assert torch.equal(loaded[name].view(torch.uint8), stored[name].view(torch.uint8)) or "F16" in str(
            read_header(path).tensors[name].dtype
        )


def test_plain_checkpoints_fill_parts_too(tmp_path: Path) -> None:
    model = random_model()
    save_hf(model, tmp_path, torch.float32)
    name = "layers.0.self_attn.qkv_proj.weight"
    read = torch.empty(dict(model.named_parameters())[name].shape)
    open_checkpoint(tmp_path).fill({name: read})
    assert torch.equal(read, dict(model.named_parameters())[name])
