"""Recognizes checkpoints that other programs quantized or packed, by their files and tensors.

A refusal can then say what the checkpoint is, and what to do instead.
"""

from collections.abc import Iterable
from pathlib import Path

from model.errors import ModelError, quoted

START_OVER = "start from the 16-bit checkpoint, and quantize it with tools.quantize"
GGUF = ".gguf"
STEMS = ("model", "consolidated")  # of files that are read here: HF's and Mistral's, the same weights twice

ENDINGS = {  # of tensors' names, and what such tensors mean; the first one that occurs counts
    ".codes": "were quantized by tools.quantize, and config.json does not say so",
    ".W_q": "were quantized by HQQ",
    ".qweight": "were quantized by GPTQ or AWQ",
    ".absmax": "were quantized by bitsandbytes",
    ".SCB": "were quantized by bitsandbytes",
    ".q_weight": "were quantized by ExLlamaV2",
    ".trellis": "were quantized by ExLlamaV3",
    ".weight_packed": "were quantized by compressed-tensors",
    ".weight_scale": "are in FP8",
    ".weight_scale_inv": "are in FP8",
    ".input_scale": "are in FP8",
    ".lora_A.weight": "are a LoRA adapter, not a model",
    ".scales": "were quantized by MLX",
}


def check_files(folder: Path) -> None:
    """Raises `ModelError` if the folder has another program's weights, and none that are read here."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.startswith(STEMS) and ".safetensors" in name for name in names):
        return
    if "adapter_config.json" in names:
        raise ModelError(
            f"{folder}: a LoRA adapter (adapter_config.json), which changes a model and is not one; merge it "
            "into its 16-bit base model, and load that"
        )
    if packed := [name for name in names if name.lower().endswith(GGUF)]:
        raise ModelError(f"{folder}: the weights are in GGUF ({quoted(packed[0])}); {START_OVER}")
    if any(name.endswith(".npz") for name in names):
        raise ModelError(
            f"{folder}: the weights were written by MLX (.npz), and are not read here; {START_OVER}"
        )
    if "qmodel.pt" in names:
        raise ModelError(
            f"{folder}: the weights were quantized by HQQ and are a pickle (qmodel.pt), which runs code when "
            f"opened and is never read; {START_OVER}"
        )


def check_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raises `ModelError` if a name is one that another program gives to quantized tensors."""
    found: dict[str, str] = {}
    for name in names:
        for ending in ENDINGS:
            if name.endswith(ending):
                found.setdefault(ending, name)
    for ending, what in ENDINGS.items():
        if ending in found:
            raise ModelError(f"{folder}: the weights {what} (tensor {quoted(found[ending])}); {START_OVER}")
