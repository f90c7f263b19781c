"""The configuration of a Mixtral in GGUF, from the keys of its header.

Defaults are those of llama.cpp. Its architecture `llama` is Mixtral if there are experts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.config import Fields, ModelConfig
from model.errors import ModelError, quoted

ARCHITECTURE = "general.architecture"
EOS, EOT, BOS = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "bos"))
SCALING = "llama.rope.scaling."
FACTOR, OLD_FACTOR = f"{SCALING}factor", "llama.rope.scale_linear"


def read_config(path: Path, keys: Mapping[str, Any], vocab: int) -> ModelConfig:
    """The configuration. The embeddings have `vocab` rows. Raises `ModelError` if it is not a Mixtral's."""
    found = keys.get(ARCHITECTURE)
    if found != "llama":
        raise ModelError(
            f"{path}: {ARCHITECTURE} is {quoted(found)}; only 'llama' with experts is supported, as GGUF "
            "calls Mixtral"
        )
    get = Fields(str(path), keys)
    if get.int("llama.expert_count", 0) < 1:
        raise ModelError(f"{path}: a Llama without experts; only Mixtral is supported")
    heads, hidden = get.int("llama.attention.head_count"), get.int("llama.embedding_length")
    head_dim = get.int("llama.attention.key_length", hidden // max(heads, 1))
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (size := get.int(name, head_dim)) != head_dim:
            raise ModelError(f"{path}: {name} is {size}, and Mixtral's is the head's {head_dim}")
    ends = [id for name in (EOS, EOT) if (id := token_id(path, keys, name, vocab)) is not None]
    bos = token_id(path, keys, BOS, vocab)
    return ModelConfig(
        vocab=vocab,
        hidden=hidden,
        layers=get.int("llama.block_count"),
        heads=heads,
        kv_heads=get.int("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=get.int("llama.feed_forward_length"),
        experts=get.int("llama.expert_count"),
        experts_per_token=get.int("llama.expert_used_count"),
        context=get.int("llama.context_length"),
        rope_theta=decimal(get.float("llama.rope.freq_base", 1e4)),
        norm_eps=decimal(get.float("llama.attention.layer_norm_rms_epsilon")),
        bos_id=1 if bos is None else bos,
        eos_ids=tuple(dict.fromkeys(ends)) or (2,),
        rope_factor=rope_factor(path, keys),
    )


def decimal(value: float) -> float:
    """The shortest number that float32, in which files have fractions, rounds to `value`.

    >>> decimal(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))


def token_id(path: Path, keys: Mapping[str, Any], name: str, vocab: int) -> int | None:
    """The id of a token that ends or begins a text, if the file has one."""
    found = keys.get(name)
    if found is not None and (type(found) is not int or not 0 <= found < vocab):
        raise ModelError(f"{path}: {name} is {quoted(found)}, and must be an id below {vocab}")
    return found


def rope_factor(path: Path, keys: Mapping[str, Any]) -> float:
    """The factor of rotary embedding's linear scaling; 1 if it is not scaled, which a 0 means, too."""
    kind = keys.get(SCALING + "type", "linear")
    if kind not in ("none", "linear"):
        raise ModelError(f"{path}: {SCALING}type is {quoted(kind)}; only 'none' and 'linear' are supported")
    name = FACTOR if FACTOR in keys else OLD_FACTOR
    if kind == "none" or keys.get(name) == 0:
        return 1.0
    return decimal(Fields(str(path), keys).float(name, 1.0))
