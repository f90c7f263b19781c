"""The architecture's numbers. They are read from a checkpoint's own files and from nowhere else."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ModelError, quoted

MAX_CONFIG_BYTES = 1 << 20
MOST = {  # far above any Mixtral, so that no number in a file makes the program slow or large
    "vocab": 1 << 24,
    "hidden": 1 << 20,
    "layers": 1 << 12,
    "heads": 1 << 16,
    "kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "ffn": 1 << 24,
    "experts": 1 << 8,
    "context": 1 << 24,
}
MAX_ENDS = 64  # end-of-sequence ids
FLOAT32 = (2.0**-126, 2.0**127)  # bounds of fractions, because the network computes with them in float32
NATIVE = "mixtral-runtime"  # the quant_method of this project's checkpoints: see `model.checkpoint.native`


@dataclass(frozen=True)
class ModelConfig:
    """A Mixtral's shape (arXiv 2401.04088, table 1), with the letters of `model.mixtral`.

    `context` is the longest sequence that the model was trained for, in tokens. Mixtral attends to all of it.
    Older files name a sliding window, which Mixtral does not have. Raises `ModelError` if a number is out of
    range.

    `rope_factor` is that of linear scaling: rotary embedding divides positions by it.
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
    rope_factor: float = 1.0

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                value = quoted(getattr(self, name))
                bound = "at least 1" if getattr(self, name) < 1 else f"at most {most}"
                raise ModelError(f"config: {name} is {value}, and must be {bound}")
        if self.heads % self.kv_heads:
            raise ModelError(
                f"config: {self.heads} query heads are not a multiple of {self.kv_heads} kv heads"
            )
        if self.head_dim % 2:
            raise ModelError(f"config: head_dim {self.head_dim} is odd, and rotary embedding needs pairs")
        if not 1 <= self.experts_per_token <= self.experts:
            raise ModelError(
                f"config: {quoted(self.experts_per_token)} experts per token out of {self.experts}"
            )
        for id in (self.bos_id, *self.eos_ids):
            if not 0 <= id < self.vocab:
                raise ModelError(
                    f"config: the begin or end id {quoted(id)} is outside the vocabulary of {self.vocab}"
                )

    @staticmethod
    def read(folder: Path) -> "ModelConfig":
        """The configuration in `folder`, from HF's `config.json` or else Mistral's `params.json`.

        Raises `ModelError` if both are missing, or if the file is not valid JSON or not a Mixtral's.
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
    """A configuration from the contents of `config.json`.

    End-of-sequence ids come from `generation`, too, the contents of `generation_config.json`, because either
    file may name one that the other lacks.

    >>> from_hf({"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
    ...          "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    ...          "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}).head_dim
    128
    """
    get = Fields("config.json", config)
    if config.get("model_type") != "mixtral":
        found = quoted(config.get("model_type"))
        raise ModelError(f"config.json: model_type is {found}; only 'mixtral' is supported")
    check_quantization(config)
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act is {quoted(config['hidden_act'])}; Mixtral's is 'silu'")
    if (window := config.get("sliding_window")) is not None:
        warnings.warn(
            f"config.json: sliding_window is {quoted(window)}, and is ignored: Mixtral attends to all tokens",
            RuntimeWarning,
            stacklevel=2,
        )
    heads, hidden = get.int("num_attention_heads"), get.int("hidden_size")
    vocab = get.int("vocab_size")
    ends = eos_ids({"eos_token_id": 2} | dict(config), vocab) + eos_ids(generation or {}, vocab)
    rope_theta, rope_factor = hf_rope(config)
    return ModelConfig(
        vocab=vocab,
        hidden=hidden,
        layers=get.int("num_hidden_layers"),
        heads=heads,
        kv_heads=get.int("num_key_value_heads", heads),
        head_dim=get.int("head_dim", hidden // max(heads, 1)),
        ffn=get.int("intermediate_size"),
        experts=get.int("num_local_experts", 8),
        experts_per_token=get.int("num_experts_per_tok", 2),
        context=get.int("max_position_embeddings", 32768),
        rope_theta=rope_theta,
        norm_eps=get.float("rms_norm_eps", 1e-5),
        bos_id=get.int("bos_token_id", 1),
        eos_ids=tuple(dict.fromkeys(ends)),
        rope_factor=rope_factor,
    )


def check_quantization(config: Mapping[str, Any]) -> None:
    """Raise `ModelError` if `config.json` says that another program quantized the weights."""
    method = section(config, "quantization_config").get("quant_method", "another program")
    if config.get("quantization"):  # MLX's name for its settings
        method = "mlx"
    elif not config.get("quantization_config") or method == NATIVE:
        return
    remedy = "start from the 16-bit checkpoint, and quantize it with tools.quantize"
    if method == "hqq":
        remedy = "convert it with python -m tools.quantize FOLDER OUT"
    raise ModelError(f"config.json: the weights were quantized by {quoted(method)}; {remedy}")


def from_mistral(params: Mapping[str, Any]) -> ModelConfig:
    """A configuration from the contents of Mistral's `params.json`."""
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
    """The contents of a `config.json` that `from_hf` and Transformers read back as `config`."""
    linear = {"rope_scaling": {"rope_type": "linear", "factor": config.rope_factor}}
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
        **(linear if config.rope_factor != 1 else {}),
        "rms_norm_eps": config.norm_eps,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def hf_rope(config: Mapping[str, Any]) -> tuple[float, float]:
    """The rotary base and the factor of linear scaling. Newer files have them in `rope_parameters`, older
    ones in `rope_theta` and `rope_scaling`, which counts if a file has both."""
    source = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = section(config, source)
    theta = Fields("config.json", dict(config) | found).float("rope_theta", 1e6)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ModelError(
            f"config.json: rope_type is {quoted(kind)}; only 'default' and 'linear' are supported"
        )
    share = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ModelError(
            f"config.json: partial_rotary_factor is {quoted(share)}; Mixtral turns all dimensions of a head"
        )
    return theta, Fields(f"config.json {source}", found).float("factor") if kind == "linear" else 1.0


def ties_embeddings(folder: Path) -> bool:
    """Whether the configuration in `folder` says that the head is the embeddings' matrix. Then a file may
    hold one of the two. Raises `ModelError` if it does not say so clearly."""
    path = folder / "config.json"
    tied = read_json(path).get("tie_word_embeddings") if path.is_file() else None
    if not isinstance(tied, bool | None):
        raise ModelError(f"config.json: tie_word_embeddings is {quoted(tied)}, and must be true or false")
    return bool(tied)


def eos_ids(config: Mapping[str, Any], vocab: int) -> tuple[int, ...]:
    """The end-of-sequence ids in a file, which has a number, a list of numbers or none.

    The model cannot write ids outside its vocabulary. They are left out with a warning.
    """
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids) or len(ids) > MAX_ENDS:
        raise ModelError(
            f"config.json: eos_token_id is {quoted(value)}, and must be a token id or a list of at most "
            f"{MAX_ENDS} of them"
        )
    outside = [i for i in ids if not 0 <= i < vocab]
    if outside:
        warnings.warn(
            f"config.json: eos_token_id {quoted(outside)} is outside the vocabulary of {quoted(vocab)}, and "
            "ends no text",
            RuntimeWarning,
            stacklevel=2,
        )
    return tuple(dict.fromkeys(i for i in ids if i not in outside))


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside the configuration, empty if it is absent or null."""
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"config.json: {name} is {quoted(value)}, and must be an object")
    return dict(value)


class Fields:
    """Typed access to one JSON object. Errors name the wrong or missing field."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def int(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None and default is not None:  # HF writes null for "derive it"
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{self.source}: {name} is {quoted(value)}, and must be an integer")
        return value

    def float(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        least, most = FLOAT32
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            raise ModelError(
                f"{self.source}: {name} is {quoted(value)}, and must be a positive number that float32 holds"
            )
        return float(value)


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file of up to `limit` bytes. Raises `ModelError` if the file has none."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
            size = path.stat().st_size
        value = json.loads(data.decode("utf-8")) if len(data) <= limit else None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # UTF-8, JSON, a number too long, too many brackets
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if len(data) > limit:
        raise ModelError(f"{path}: {size} bytes, too large for a configuration file")
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__} where an object was expected")
    return value
