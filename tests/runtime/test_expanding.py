"""What is said of a GPU that has to expand weights, on a CPU that expands them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from model.mixtral import Mixtral
from model.quant.expert import BlobExperts, ExpertFormat
from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from model.target import Target
from runtime import expanding, loader
from runtime.expanding import cost_of_expanding, memory_bandwidth
from runtime.loader import empty_model, slow_products
from tests.model.reference import TINY

CONFIG = replace(TINY, hidden=32, ffn=64)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def make(attention: int, experts: int) -> tuple[Mixtral, ExpertFormat]:
    formats = Formats(*(QuantSpec(bits, 16 if bits < 16 else 0) for bits in (attention, experts)))
    spec = formats.experts
    form = ExpertFormat.of(CONFIG, spec, torch.float32, Target.of(CPU))
    provide = lambda layer: BlobExperts.empty(form, CONFIG.experts, CPU)  # noqa: E731
    return empty_model(CONFIG, formats, torch.float32, CPU, provide), form


def test_a_tokens_weights_are_counted() -> None:
    c = CONFIG
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim + c.heads * c.head_dim
    trunk, experts = c.layers * heads * c.hidden, c.layers * c.experts_per_token * 3 * c.hidden * c.ffn
    for attention, bits, weights in ((4, 16, trunk), (16, 4, experts), (4, 4, trunk + experts)):
        moved = 35 * weights
        said = cost_of_expanding(*make(attention, bits), 1e9)
        about = f"a token moves about {moved / 1e9:.3g} GB of device memory for that, "
        assert said == f"{about}{moved / 1e9:.2g} s at 1 GB/s"
    shapes = {(64, 32): 1, (32, 32): 1, (128, 32): 2, (32, 64): 2}  # of a layer, and how many a token takes
    row = lambda K: K // 2 + 2 * K // 16 + 4  # noqa: E731, codes of 4 bits, a scale and a zero for 16, a step
    stored = c.layers * sum(count * N * row(K) for (N, K), count in shapes.items())
    said = cost_of_expanding(*make(4, 4), None)
    assert said.endswith(f", {35 * (trunk + experts) / stored:.0f} times what the fast product reads")


def test_of_a_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    tells = SimpleNamespace(memory_clock_rate=5001000, memory_bus_width=256)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: tells)
    assert memory_bandwidth(CUDA) == pytest.approx(320e9, rel=0.001)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert memory_bandwidth(CUDA) is None


def test_it_is_said_once_and_of_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = make(4, 4)
    for module in model.modules():
        if hasattr(module, "remark"):
            module.remark = "needs more"
    object.__setattr__(form, "remark", "needs more")
    monkeypatch.setattr(loader, "memory_bandwidth", lambda device: 320e9)
    (line,) = slow_products(model, form, CUDA)
    names = "attention in format 4g16 and experts in format 4g16"
    start = f"{names}: computed slowly, because the fast product needs more"
    assert line == f"{start}; " + expanding.cost_of_expanding(model, form, 320e9)
    assert slow_products(model, form, CPU) == [start]
