"""Models as mergekit makes them, against Transformers: any number of experts, tied embeddings, scaling."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralForCausalLM

from dev.peers.config import FORMULAS
from model.checkpoint import open_checkpoint, save_hf
from model.config import ModelConfig
from model.errors import ModelError
from model.mixtral import Mixtral
from tests.model.oracle import random_oracle
from tests.model.reference import TINY, greedy, random_ids, random_model

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(folder: Path) -> Mixtral:
    """Our model, in which a row that is not filled shows."""
    checkpoint = open_checkpoint(folder)
    model = Mixtral(checkpoint.config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    seen: list[int] = []
    checkpoint.load(model, seen.append)
    assert sum(seen) == checkpoint.bytes
    return model


def compare(folder: Path, steps: int = 24) -> None:
    """Logits and greedy text of the checkpoint, as we and as Transformers open it."""
    ours = load(folder)
    theirs: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, **FORMULAS).eval()
    ids = random_ids(ours.config, 2, 29)
    with torch.inference_mode():
        expected = theirs(ids).logits
        assert expected.std() > 0.1, "these logits could not tell models apart"
        torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        text = theirs.generate(
            ids[:, :7],
            attention_mask=torch.ones_like(ids[:, :7]),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 7:]
    assert torch.equal(greedy(ours, ids[:, :7], steps), text)


def save(
    folder: Path, config: ModelConfig, *, tied: bool = False, stacked: bool = False, seed: int = 3
) -> None:
    """A random model, made and saved by Transformers."""
    oracle = random_oracle(config, seed, tied)
    oracle.save_pretrained(folder, save_original_format=not stacked)


def rewrite(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Give the checkpoint's file other tensors: `None` removes one."""
    file = folder / "model.safetensors"
    tensors = {
        name: tensor for name, tensor in (load_file(file) | dict(changes)).items() if tensor is not None
    }
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("experts", "chosen"), [(1, 1), (2, 1), (2, 2), (3, 2), (5, 1), (6, 6), (12, 3), (16, 2), (16, 16)]
)
@pytest.mark.parametrize("stacked", [False, True])
def test_experts(tmp_path: Path, experts: int, chosen: int, stacked: bool) -> None:
    save(tmp_path, replace(TINY, experts=experts, experts_per_token=chosen), stacked=stacked)
    compare(tmp_path)


@pytest.mark.parametrize("factor", [1.0, 2.0, 2.5, 8.0])
@pytest.mark.parametrize("older", [False, True])
def test_linear_scaling(tmp_path: Path, factor: float, older: bool) -> None:
    save(tmp_path, replace(TINY, rope_factor=factor))
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert ("factor" in written["rope_parameters"]) == (factor != 1)
    if older:
        del written["rope_parameters"]
        scaling = {"rope_scaling": {"type": "linear", "factor": factor}, "rope_theta": TINY.rope_theta}
        path.write_text(json.dumps(written | scaling))
    assert open_checkpoint(tmp_path).config.rope_factor == factor
    compare(tmp_path)


def test_linear_scaling_matters(tmp_path: Path) -> None:
    plain = random_model(TINY)
    scaled = Mixtral(replace(TINY, rope_factor=2.0))
    scaled.load_state_dict(plain.state_dict())
    ids = random_ids(TINY, 1, 29)
    with torch.inference_mode():
        assert (plain(ids) - scaled(ids)).abs().max() > 0.1


def test_transformers_opens_a_scaled_model_that_we_write(tmp_path: Path) -> None:
    save_hf(random_model(replace(TINY, rope_factor=2.5, experts=6)), tmp_path, torch.float32)
    compare(tmp_path)


@pytest.mark.parametrize("stacked", [False, True])
def test_tied_embeddings(tmp_path: Path, stacked: bool) -> None:
    save(tmp_path, TINY, tied=True, stacked=stacked)
    stored = load_file(tmp_path / "model.safetensors")
    assert EMBEDDINGS in stored and HEAD not in stored
    compare(tmp_path)
    model = load(tmp_path)
    assert torch.equal(model.lm_head.weight, model.embed_tokens.weight)


def test_tied_embeddings_in_shards(tmp_path: Path) -> None:
    random_oracle(TINY, 3, tied=True).save_pretrained(tmp_path, max_shard_size="20KB")
    assert open_checkpoint(tmp_path).files > 2
    compare(tmp_path)


@pytest.mark.parametrize("same", [False, True])
def test_tied_embeddings_with_a_head_in_the_file(tmp_path: Path, same: bool) -> None:
    """A head that differs is one of its own."""
    save(tmp_path, TINY, tied=True)
    head = load_file(tmp_path / "model.safetensors")[EMBEDDINGS].clone()
    rewrite(tmp_path, {HEAD: head if same else head.flip(0)})
    compare(tmp_path)
    assert torch.equal(load(tmp_path).lm_head.weight, head if same else head.flip(0))


def test_tied_embeddings_with_the_head_alone_in_the_file(tmp_path: Path) -> None:
    save(tmp_path, TINY, tied=True)
    rewrite(tmp_path, {HEAD: load_file(tmp_path / "model.safetensors")[EMBEDDINGS], EMBEDDINGS: None})
    compare(tmp_path)


def test_bytes_of_tied_embeddings(tmp_path: Path) -> None:
    """Each parameter is filled by pieces that read alone gives the same."""
    save(tmp_path, TINY, tied=True)
    checkpoint = open_checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert checkpoint.bytes == sum(tensor.nbytes for tensor in (*stored.values(), stored[EMBEDDINGS]))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.read(name, torch.device("cpu")), stored[EMBEDDINGS])


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    save(tmp_path, TINY)
    rewrite(tmp_path, {HEAD: None})
    with pytest.raises(ModelError) as error:
        open_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no tensor 'lm_head.weight', and config.json does not say that the embeddings take its "
        "place (tie_word_embeddings); the files are incomplete or belong to another configuration"
    )


def test_a_tied_model_without_both_is_refused(tmp_path: Path) -> None:
    save(tmp_path, TINY, tied=True)
    rewrite(tmp_path, {EMBEDDINGS: None})
    with pytest.raises(
        ModelError, match=r"2 tensors missing \('model\.embed_tokens\.weight', 'lm_head\.weight'\)"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("gates", [torch.float32, torch.float16, torch.bfloat16])
def test_gates_keep_their_precision(tmp_path: Path, gates: torch.dtype) -> None:
    """Among weights of another dtype. The network computes in float32, so both round nothing."""
    save(tmp_path, replace(TINY, experts=6), tied=True)
    stored = load_file(tmp_path / "model.safetensors")
    changes = {name: t.to(gates if ".gate." in name else torch.bfloat16) for name, t in stored.items()}
    rewrite(tmp_path, changes)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == torch.bfloat16
    for layer, block in enumerate(load(tmp_path).blocks):
        gate = changes[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.equal(block.block_sparse_moe.gate.weight, gate.float())
    compare(tmp_path)


def test_all_at_once(tmp_path: Path) -> None:
    config = replace(TINY, vocab=101, experts=12, experts_per_token=5, rope_factor=4.0, rope_theta=1e4)
    save(tmp_path, config, tied=True)
    compare(tmp_path)
