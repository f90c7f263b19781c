"""`python -m dev.peers.accelerate` on a model small enough for a test: what it places and adds up."""

import importlib.metadata
import json
from typing import Any

import pytest
import torch

from dev.peers import accelerate as bench
from model.config import ModelConfig
from model.shapes import SHAPES

SMALL = ModelConfig(
    vocab=200, hidden=64, layers=6, heads=4, kv_heads=2, head_dim=16, ffn=128, experts=4,
    experts_per_token=2, context=64, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
LAYER = 2 * (4 * 3 * 64 * 128 + 4 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64)  # bytes
EMBEDDINGS = 2 * 200 * 64
WORDS = ["--shape", "quarter", "--device", "cpu", "--tokens", "2", "--prompt", "3"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setitem(SHAPES, "quarter", SMALL)


def result(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert bench.main([*WORDS, *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_layers_of_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    limit = EMBEDDINGS + 3 * LAYER + LAYER // 2  # of which accelerate keeps room for the largest layer
    found = result(capsys, "--layers", "4", "--vram", str(limit))
    assert "6 layers within the limit, 2 of them on the device; measured with 1 of 4" in found["placement"]
    kept, moved, rest = (
        found[f"ms_per_{name}"] for name in ("layer_on_device", "layer_offloaded", "token_outside_layers")
    )
    assert kept > 0 and moved > 0
    assert found["measured_ms_per_token"] == pytest.approx(rest + kept + 3 * moved)
    assert found["ms_per_token"] == pytest.approx(rest + 2 * kept + 4 * moved)
    assert found["tokens_per_s"] == pytest.approx(1000 / found["ms_per_token"])
    head_and_norm = EMBEDDINGS + 2 * 64  # after the layers that no longer fit
    assert found["bytes_moved_per_token"] == 4 * LAYER + head_and_norm
    assert found["device"].startswith("cpu, where nothing is moved")
    assert found["cudnn_attention"] is False and torch.backends.cuda.cudnn_sdp_enabled() is before
    assert found["kernels"]["experts"] == "grouped_mm" and found["machine"]["accelerate"]


@pytest.mark.parametrize(("limit", "kept", "moved"), [("1GiB", 6, 0), ("4KiB", 0, 6)])
def test_layers_of_one_kind(capsys: pytest.CaptureFixture[str], limit: str, kept: int, moved: int) -> None:
    found = result(capsys, "--layers", "1", "--vram", limit)
    assert f"6 layers within the limit, {kept} of them" in found["placement"]
    assert (found["ms_per_layer_on_device"] is None, found["ms_per_layer_offloaded"] is None) == (
        not kept,
        not moved,
    )
    assert (found["bytes_moved_per_token"] > 0) == (moved > 0)


def test_offloaded_weights_are_there_only_while_used() -> None:
    model = bench.empty_model(SMALL)
    bench.fill(model)
    assert all(weight.isfinite().all() and weight.any() for weight in model.parameters())
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    places: dict[str, bench.Place] = {name: 0 for name, _ in bench.placeable(model)}
    places["model.layers.2"] = "cpu"
    ids = torch.arange(5)[None]
    with torch.no_grad():
        before = model(ids).logits
        bench.dispatch(model, places, torch.device("cpu"))
        layers = model.model.layers
        assert {w.device.type for w in layers[2].parameters()} == {"meta"}
        assert {w.device.type for n in (0, 1, 3) for w in layers[n].parameters()} == {"cpu"}
        assert torch.equal(model(ids).logits, before) and before.isfinite().all()
    assert all(
        torch.equal(weights[name], w) for name, w in model.state_dict().items() if w.device.type == "cpu"
    )


def test_what_cannot_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.main([*WORDS, "--layers", "1", "--vram", str(EMBEDDINGS + 3 * LAYER)]) == 1
    assert capsys.readouterr().err == "error: 2 of 6 layers fit the device; measure at least 2 --layers\n"
    monkeypatch.setattr(bench, "free_host_bytes", lambda: 1000)
    assert bench.main([*WORDS, "--layers", "2"]) == 1
    assert "2 layers take" in capsys.readouterr().err

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert bench.main(WORDS) == 1
    assert capsys.readouterr().err.startswith("error: accelerate is not installed; pip install")
