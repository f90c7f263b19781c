"""The table of refusals in docs/checkpoints.md: each model is made, and both ways to open it say its line."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import save_hf
from runtime import Engine, EngineOptions, LoadError
from tests.model.checkpoint.conftest import random_model, read_all
from tools.quantize import command as quantize

PAGE = Path(__file__).resolve().parent.parent / "docs" / "checkpoints.md"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def table() -> dict[str, str]:
    """The line for each model of the table. FOLDER stands for the folder's path."""
    section = PAGE.read_text("utf-8").partition("## What is refused")[2]
    return dict(re.findall(r"^\| ([^|`]+) \| `([^`]+)` \|$", section, re.MULTILINE))


def config(**changes: object) -> Callable[[Path], None]:
    """A model whose config.json says something else, too."""

    def make(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changes))

    return make


def quantized_by(method: str) -> Callable[[Path], None]:
    return config(quantization_config={"quant_method": method, "bits": 4})


def tensor(name: str) -> Callable[[Path], None]:
    """A model with one more tensor."""
    return lambda folder: save_file(read_all(folder) | {name: torch.zeros(2)}, folder / "model.safetensors")


def files(*names: str) -> Callable[[Path], None]:
    """A model whose weights are in files of these names."""

    def make(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(bytes(8))

    return make


def without_model(folder: Path) -> None:
    """A byte-level tokenizer, as Llama 3's."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    found = {"normalizer": None, "pre_tokenizer": level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(found))


MODELS: dict[str, Callable[[Path], None]] = {
    "a LoRA adapter": files("adapter_config.json", "adapter_model.safetensors"),
    "GPTQ": quantized_by("gptq"),
    "GPTQ, older": files("gptq_model-4bit-128g.safetensors"),
    "GPTQ or AWQ without a word in config.json": tensor(f"{Q_PROJ}.qweight"),
    "AWQ": quantized_by("awq"),
    "bitsandbytes": quantized_by("bitsandbytes"),
    "bitsandbytes, older": tensor(f"{Q_PROJ}.SCB"),
    "ExLlamaV2": files("output-00001-of-00002.safetensors", "output-00002-of-00002.safetensors"),
    "ExLlamaV3": quantized_by("exl3"),
    "FP8": tensor(f"{Q_PROJ}.weight_scale"),
    "compressed-tensors": quantized_by("compressed-tensors"),
    "MLX": config(quantization={"bits": 4, "group_size": 64}),
    "MLX, older": files("weights.00.npz"),
    "MLC": files("mlc-chat-config.json", "params_shard_0.bin"),
    "OpenVINO": files("openvino_model.bin", "openvino_model.xml"),
    "ONNX": files("model.onnx"),
    "TensorRT": files("rank0.engine"),
    "GGML": files("ggml-model-q4_0.bin"),
    "Flax": files("flax_model.msgpack"),
    "TensorFlow": files("tf_model.h5"),
    "hqq's pickles": files("qmodel.pt"),
    "PyTorch's pickles": files("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    "Mistral's pickles": files("consolidated.00.pth"),
    "a Git LFS pointer": lambda folder: (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    ),
    "experts of Llama 3's kind": without_model,
    "another architecture": config(model_type="qwen2_moe"),
    "rotary scaling other than linear": config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_the_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    save_hf(random_model(), folder, torch.float32)
    MODELS[model](folder)
    with pytest.raises(LoadError) as error:
        Engine.load(folder, EngineOptions(device="cpu"))
    assert str(error.value).replace(str(folder), "FOLDER") == table().get(model)
    weights_are_good = model == "experts of Llama 3's kind"  # so `--tokenizer` would help
    flags = ["--attention", "16", "--experts", "16", "--head", "16", "--quiet"]
    assert quantize.main([str(folder), str(out), *flags]) == (0 if weights_are_good else 1)
    said = capsys.readouterr().err
    assert said.startswith(
        f"warning: {error.value}, or name another by --tokenizer"
        if weights_are_good
        else f"error: {error.value}\n"
    )
    assert out.exists() == weights_are_good


def test_the_table_has_these_models() -> None:
    assert [*table()] == [*MODELS]
