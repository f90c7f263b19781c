"""The architecture's numbers, read from a checkpoint's own files and from nowhere else."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ModelError

MAX_CONFIG_BYTES = 1 << 20
NATIVE = "mixtral-runtime"  # the quant_method of our own checkpoints: see `model.checkpoint.native`


@dataclass(frozen=True)
class ModelConfig:
    """A Mixtral's shape (arXiv 2401.04088, table 1). The letters are the legend of `model.mixtral`.

    `context` is the longest sequence the model was made for, in tokens. There is no sliding window: Mixtral
    attends over all of it, whatever an older file may say.
    """

    vocab: int  # V
    hidden: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # K
    ffn: int  # F
    experts: int  # E
    experts_per_token: int  # A
    context: int
    rope_theta: float
    norm_eps: float
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        sizes = ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "experts", "context")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ModelError(f"config: {name} is {getattr(self, name)}, and must be at least 1")
        if self.heads % self.kv_heads:
            raise ModelError(
                f"config: {self.heads} query heads are not a multiple of {self.kv_heads} kv heads"
            )
        if self.head_dim % 2:
            raise ModelError(f"config: head_dim {self.head_dim} is odd, and rotary embedding needs pairs")
        if not 1 <= self.experts_per_token <= self.experts:
            raise ModelError(f"config: {self.experts_per_token} experts per token out of {self.experts}")

    @staticmethod
    def read(folder: Path) -> "ModelConfig":
        """The configuration in `folder`: HF's `config.json`, or else Mistral's `params.json`.

        Raises `ModelError` if there is neither, or one that is not valid JSON or not a Mixtral's.
        """
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            generation = folder / "generation_config.json"
            return from_hf(config, read_json(generation) if generation.is_file() else {})
        if (folder / "params.json").is_file():
            return from_mistral(read_json(folder / "params.json"))
        raise ModelError(
            f"{folder}: no config.json (HF) and no params.json (Mistral), so this is not a checkpoint"
        )


def from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """From the contents of `config.json` and, for the end-of-sequence ids, `generation_config.json`.

    >>> from_hf({"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
    ...          "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    ...          "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}).head_dim
    128
    """
    get = Fields("config.json", config)
    if config.get("model_type") != "mixtral":
        raise ModelError(
            f"config.json: model_type is {config.get('model_type')!r}; only 'mixtral' is supported"
        )
    method = section(config, "quantization_config").get("quant_method", "unknown")
    if config.get("quantization_config") and method != NATIVE:
        raise ModelError(
            f"config.json: weights are quantised by {method!r}; start from the 16-bit checkpoint instead"
        )
    if config.get("tie_word_embeddings"):
        raise ModelError(
            "config.json: tie_word_embeddings is true; Mixtral's embeddings and head are separate"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act is {config['hidden_act']!r}; Mixtral's is 'silu'")
    heads, hidden = get.int("num_attention_heads"), get.int("hidden_size")
    return ModelConfig(
        vocab=get.int("vocab_size"),
        hidden=hidden,
        layers=get.int("num_hidden_layers"),
        heads=heads,
        kv_heads=get.int("num_key_value_heads", heads),
        head_dim=get.int("head_dim", hidden // max(heads, 1)),
        ffn=get.int("intermediate_size"),
        experts=get.int("num_local_experts", 8),
        experts_per_token=get.int("num_experts_per_tok", 2),
        context=get.int("max_position_embeddings", 32768),
        rope_theta=hf_rope_theta(config),
        norm_eps=get.float("rms_norm_eps", 1e-5),
        bos_id=get.int("bos_token_id", 1),
        eos_ids=eos_ids({"eos_token_id": 2} | dict(config) | dict(generation or {})),
    )


def from_mistral(params: Mapping[str, Any]) -> ModelConfig:
    """From the contents of Mistral's `params.json`."""
    get = Fields("params.json", params)
    moe = params.get("moe")
    if not isinstance(moe, Mapping):
        raise ModelError("params.json: no 'moe' section, so this is not a Mixtral")
    return ModelConfig(
        vocab=get.int("vocab_size"),
        hidden=get.int("dim"),
        layers=get.int("n_layers"),
        heads=get.int("n_heads"),
        kv_heads=get.int("n_kv_heads"),
        head_dim=get.int("head_dim"),
        ffn=get.int("hidden_dim"),
        experts=Fields("params.json moe", moe).int("num_experts"),
        experts_per_token=Fields("params.json moe", moe).int("num_experts_per_tok"),
        context=get.int("max_seq_len", 32768),
        rope_theta=get.float("rope_theta", 1e6),
        norm_eps=get.float("norm_eps", 1e-5),
    )


def to_hf(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The contents of a `config.json` that `from_hf`, and Transformers, read back as `config`."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def hf_rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base, from either spelling: `rope_theta`, or `rope_parameters` in newer files."""
    nested = section(config, "rope_parameters")
    scaling = nested | section(config, "rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ModelError(f"config.json: rope_type is {kind!r}; Mixtral's is 'default' (unscaled)")
    return Fields("config.json", dict(config) | nested).float("rope_theta", 1e6)


def eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: a number, a list of numbers, or none at all."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ModelError(f"config.json: eos_token_id is {value!r}, and must be a token id or a list of them")
    return tuple(ids)


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside the configuration; empty if it is absent or null."""
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"config.json: {name} is {value!r}, and must be an object")
    return dict(value)


class Fields:
    """Typed access to one JSON object, so that a wrong or missing field is named."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def int(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None and default is not None:  # HF writes null for "derive it"
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{self.source}: {name} is {value!r}, and must be an integer")
        return value

    def float(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e300:
            raise ModelError(f"{self.source}: {name} is {value!r}, and must be a positive number")
        return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a file. Raises `ModelError` naming the file."""
    try:
        size = path.stat().st_size
        value = json.loads(path.read_text(encoding="utf-8")) if size <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, endless numbers
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path}: {size} bytes, too large for a configuration file")
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__} where an object was expected")
    return value
