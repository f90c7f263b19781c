"""Recognizes checkpoints that other programs quantized or packed, by their files and tensors.

A refusal can then say what the checkpoint is, and what to do instead.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from model.errors import ModelError, quoted

START_OVER = "start from the 16-bit checkpoint, and quantize it with tools.quantize"
CONVERT = "convert it with python -m tools.quantize {} OUT"
CLOSED = "a pickle, which runs code when opened and is never read"
GGUF = ".gguf"
STEMS = ("model", "consolidated")  # of files that are read here: HF's and Mistral's, the same weights twice

FILES = {  # patterns of names, in small letters, what such a file is, and what to do; the first one counts
    "adapter_config.json": (
        "a LoRA adapter, which changes a model and is not one",
        "merge it into its 16-bit base model, and load that",
    ),
    f"*{GGUF}": ("the weights are in GGUF", CONVERT),
    "qmodel.pt": (f"quantized by HQQ, in {CLOSED}", START_OVER),
    "gptq_model*.safetensors": ("the weights were quantized by GPTQ", START_OVER),
    "output*.safetensors": ("the weights were quantized by ExLlama", START_OVER),
    "*.npz": ("the weights are MLX's", START_OVER),
    "mlc-chat-config.json": ("the weights were compiled by MLC", START_OVER),
    "openvino_*.bin": ("the weights are OpenVINO's", START_OVER),
    "*.onnx": ("the weights are in ONNX", START_OVER),
    "*.engine": ("the weights were compiled by TensorRT", START_OVER),
    "ggml*.bin": ("the weights are in GGML, which was before GGUF", START_OVER),
    "*.msgpack": ("the weights are Flax's", "take those in safetensors"),
    "*.h5": ("the weights are TensorFlow's", "take those in safetensors"),
}
ENDINGS = {  # of tensors' names, and what such tensors mean; the first one that occurs counts
    ".codes": ("were quantized by tools.quantize, and config.json does not say so", START_OVER),
    ".W_q": ("were quantized by HQQ", CONVERT),
    ".qweight": ("were quantized by GPTQ or AWQ", START_OVER),
    ".absmax": ("were quantized by bitsandbytes", START_OVER),
    ".SCB": ("were quantized by bitsandbytes", START_OVER),
    ".q_weight": ("were quantized by ExLlamaV2", START_OVER),
    ".trellis": ("were quantized by ExLlamaV3", START_OVER),
    ".weight_packed": ("were quantized by compressed-tensors", START_OVER),
    ".weight_scale": ("are in FP8", START_OVER),
    ".weight_scale_inv": ("are in FP8", START_OVER),
    ".input_scale": ("are in FP8", START_OVER),
    ".lora_A.weight": ("are a LoRA adapter, not a model", START_OVER),
    ".scales": ("were quantized by MLX", START_OVER),
}


def has_safetensors(names: Iterable[str]) -> bool:
    """Whether files of these names may be weights that are read here."""
    return any(name.startswith(STEMS) and ".safetensors" in name for name in names)


def check_files(folder: Path) -> None:
    """Raises `ModelError` if the folder has another program's weights, and none that are read here."""
    check_names(folder, [path.name for path in folder.iterdir()])


def check_names(model: Path | str, names: Collection[str]) -> None:
    """The same for a model whose files have these names."""
    if has_safetensors(names):
        return
    for pattern, (what, remedy) in FILES.items():
        for name in sorted(names):
            if fnmatchcase(name.lower(), pattern):
                raise ModelError(f"{model}: {what} ({quoted(name)}); {remedy.format(model)}")


def check_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raises `ModelError` if a name is one that another program gives to quantized tensors."""
    found: dict[str, str] = {}
    for name in names:
        for ending in ENDINGS:
            if name.endswith(ending):
                found.setdefault(ending, name)
    for ending, (what, remedy) in ENDINGS.items():
        if ending in found:
            raise ModelError(
                f"{folder}: the weights {what} (tensor {quoted(found[ending])}); {remedy.format(folder)}"
            )
