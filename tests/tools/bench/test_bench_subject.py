"""What is measured, and what is said of it: where a CPU can tell. GPUs are stand-ins."""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.quant.formats import KINDS
from model.shapes import SHAPES
from runtime.engine import DEMO
from runtime.errors import DeviceError, OptionError
from runtime.options import EngineOptions
from tests.quantized import quantize_folder
from tools.bench import figures, machine, subject
from tools.bench.subject import Subject, make_subject

SMALL = ModelConfig(
    vocab=128, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=64, experts=4,
    experts_per_token=2, context=64, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
CUDA = torch.device("cuda", 0)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "quarter", SMALL)


def make(tokens: int = 8, **options: Any) -> Subject:
    args = {"shape": "quarter", "layers": None, **dict.fromkeys(KINDS), "enforce": False}
    return make_subject(argparse.Namespace(**args | {"device": "cpu"} | options), tokens)


def test_options_are_an_engines() -> None:
    made = make(slots=2, policy="lfu", lookahead=2, prefetch=2, link_gbps=0.001, context=16)
    about = made.describe()
    assert made.plan.slots_per_layer == (2, 2) and made.plan.spares == 4
    assert (about["policy"], about["lookahead"], about["prefetch"], about["context"]) == ("lfu", 2, 2, 16)
    assert about["link_bytes_per_s"] == 1e6 and about["memory_bytes_per_s"] > 0  # as slow as asked for
    assert about["host_memory"].startswith("pageable, 8 blobs") and not about["resident"]
    assert make().describe()["resident"] and make().plan.context == 64


def test_all_experts_of_a_checkpoint_need_a_berth(tmp_path: Path) -> None:
    model = quantize_folder(DEMO, tmp_path / "demo", "4")
    with pytest.raises(DeviceError, match=r"holds all 64 experts in host memory, and 20 have berths"):
        make(shape=None, model=model, dtype="float32", offload="always", slots=2, berths=20)


def test_experts_that_share_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "HOST_BYTES", 1)
    made = make(slots=2, layers=5, offload="always")
    store = made.store
    assert store is not None and store.count == 4 and (made.config.layers, made.config.experts) == (5, 4)
    assert store.berth(3 * 4 + 1).data_ptr() == store.berth(1).data_ptr() != store.berth(2).data_ptr()
    whole = make(layers=5)
    for layer, block in enumerate(whole.blocks):
        for e in range(4):
            end = made.form.kept[-1].end
            resident = block.block_sparse_moe.experts.blobs[e]  # type: ignore[attr-defined]
            assert torch.equal(store.berth(layer * 4 + e)[:end], resident[:end])


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (65, {}, "these are 65 tokens, and this model was made for 64"),
        (9, {"context": 8}, "9 tokens do not fit --context 8"),
        (8, {"enforce": True}, "--enforce wants a GPU and --vram"),
        (8, {"slots": 5}, "slots is 5"),
        (8, {"distributed": True}, "a benchmark measures one process"),
    ],
)
def test_what_makes_no_sense(tokens: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(tokens, **options)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """80 GiB, of which 1 is taken outside of PyTorch. Returns what shares of it PyTorch is allowed."""
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (69 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 11 * GIB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share)
    )
    return shares


def test_a_limit_for_pytorch(gpu: list[float]) -> None:
    plan = replace(make().plan, device=CUDA, driver_bytes=GIB // 2)
    subject.enforce(plan, EngineOptions(vram="12GiB"))
    subject.enforce(replace(plan, driver_bytes=2 * GIB), EngineOptions(vram="12GiB"))
    assert gpu == [11.5 / 80, 11 / 80]


def test_memory_beside_the_plan(gpu: list[float]) -> None:
    plan = make().plan
    rest = plan.device_bytes
    plan = replace(plan, slots_bytes=plan.slots_bytes + 12 * GIB - rest - GIB // 2, driver_bytes=GIB // 2)
    found = figures.device_memory(replace(plan, device=CUDA))["device_memory"]
    assert found["planned_bytes"] == 12 * GIB and found["outside_pytorch_bytes"] == GIB
    assert found["peak_over_plan"] == 1.0 and found["peak_reserved_bytes"] == 11 * GIB
    assert figures.device_memory(plan) == {}


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(machine, "driver_version", lambda: "580.82.07")
    about = machine.machine()
    assert (about["gpu"], about["gpu_bytes"], about["driver"]) == ("NVIDIA H100", 80 * GIB, "580.82.07")
    assert machine.machine().get("cuda") == torch.version.cuda  # left out where there is none
