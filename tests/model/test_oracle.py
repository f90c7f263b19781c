"""The network computes what Transformers' Mixtral computes: logits, greedy text, gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.mixtral import Mixtral
from tests.model.oracle import from_oracle, random_oracle, to_oracle, to_their_names
from tests.model.reference import GEOMETRIES, greedy, random_ids, random_model

B, T, STEPS = 3, 29, 64

geometries = pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES.keys())
Record = Callable[[str, object], None]


@geometries
@pytest.mark.parametrize("source", ["our weights", "their weights"])
def test_logits(config: ModelConfig, source: str, record_property: Record) -> None:
    if source == "our weights":
        model = random_model(config)
        oracle = to_oracle(model)
    else:
        oracle = random_oracle(config, seed=1)
        model = from_oracle(config, oracle)
    ids = random_ids(config, B, T)
    with torch.inference_mode():
        ours, theirs = model(ids), oracle(ids).logits
    difference = (ours - theirs).abs().max().item()
    record_property("logit_difference", difference)
    assert ours.shape == (B, T, config.vocab)
    assert ours.std() > 0.1, "these logits could not tell models apart"
    assert difference < 1e-4


@geometries
def test_logits_from_saved_shards(config: ModelConfig, tmp_path: Path, record_property: Record) -> None:
    oracle = random_oracle(config, seed=2)
    oracle.save_pretrained(tmp_path, max_shard_size=sum(p.nbytes for p in oracle.parameters()) // 3)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files > 1
    model = Mixtral(config)
    checkpoint.load(model)
    ids = random_ids(config, B, T)
    with torch.inference_mode():
        difference = (model(ids) - oracle(ids).logits).abs().max().item()
    record_property("logit_difference", difference)
    assert difference < 1e-4


@geometries
def test_greedy_text(config: ModelConfig, record_property: Record) -> None:
    model = random_model(config)
    prompt = random_ids(config, B, 7)
    ours = greedy(model, prompt, STEPS)
    oracle: Any = to_oracle(model)
    with torch.inference_mode():
        theirs = oracle.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, prompt.shape[1] :]
    record_property("ids_equal", ((ours == theirs).sum().item(), theirs.numel()))
    assert theirs.shape == (B, STEPS)
    assert len(theirs.unique()) > 20, "this text could not tell models apart"
    assert torch.equal(ours, theirs)


def loss(model: Mixtral, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("name", ["8x7B's ratios", "3 of 8 experts", "heads wider than hidden"])
def test_gradients(name: str) -> None:
    config = GEOMETRIES[name]
    model = random_model(config)
    oracle = to_oracle(model)
    ids = random_ids(config, B, T)
    loss(model, ids, model(ids)).backward()
    loss(model, ids, oracle(ids).logits).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    expected = dict(oracle.named_parameters())
    for parameter, ours in to_their_names(config, gradients).items():
        theirs = expected.pop(parameter).grad
        assert theirs is not None and theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())
    assert not expected, "our model has no gradient for these"
