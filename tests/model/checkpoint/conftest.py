"""Tiny Mixtrals, and folders that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import save_hf
from model.config import ModelConfig
from model.mixtral import Mixtral

if TYPE_CHECKING:  # `pytest -m gpu` comes by here on machines that do not have it
    from transformers import MixtralForCausalLM

TINY = ModelConfig(
    vocab=48, hidden=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=20, experts=3, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip


def random_model(config: ModelConfig = TINY, seed: int = 0) -> Mixtral:
    torch.manual_seed(seed)
    model = Mixtral(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, by the safetensors package."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A whole HF checkpoint in one float32 file."""
    save_hf(random_model(), tmp_path / "hf", torch.float32)
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several shards."""
    save_hf(random_model(), tmp_path / "sharded", torch.float32, max_shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


@pytest.fixture
def rewrite(hf: Path) -> Callable[[Mapping[str, Tensor | None]], Path]:
    """Give the HF checkpoint other tensors: `None` removes one."""

    def apply(changes: Mapping[str, Tensor | None]) -> Path:
        tensors = load_file(hf / "model.safetensors")
        tensors = {name: tensor for name, tensor in (tensors | dict(changes)).items() if tensor is not None}
        save_file(tensors, hf / "model.safetensors")
        return hf

    return apply


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixtralForCausalLM, Path, Path]:
    """Transformers' model, and what it saves: a tensor per expert, and experts stacked."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=TINY.vocab, hidden_size=TINY.hidden, num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads, num_key_value_heads=TINY.kv_heads, head_dim=TINY.head_dim,
        intermediate_size=TINY.ffn, num_local_experts=TINY.experts, num_experts_per_tok=2,
        max_position_embeddings=TINY.context, rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        bos_token_id=1, eos_token_id=2, initializer_range=0.3, torch_dtype="float32",
    )  # fmt: skip
    theirs = MixtralForCausalLM(config).eval()
    folders = [tmp_path_factory.mktemp(name) for name in ("per-expert", "stacked")]
    theirs.save_pretrained(folders[0], max_shard_size="20KB")
    theirs.save_pretrained(folders[1], max_shard_size="20KB", save_original_format=False)
    return theirs, folders[0], folders[1]


def read_index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return index
