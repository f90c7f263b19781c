"""Weights that are packed for a CPU give the bits of row-major weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.linear import Linear, PackedLinear, pack, packs

CPU = torch.device("cpu")
BFLOAT16 = torch.zeros(1, dtype=torch.bfloat16)
packing = pytest.mark.skipif(not packs(BFLOAT16), reason="this CPU or PyTorch packs no bfloat16 weights")


def make_linear(inputs: int, outputs: int, dtype: torch.dtype) -> Linear:
    linear = Linear(inputs, outputs, dtype, CPU).requires_grad_(False)
    linear.weight.copy_(torch.randn(outputs, inputs) / inputs**0.5)
    return linear


@packing
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (128, 400), (1, 3), (77, 33), (1024, 2048)])
def test_packed_is_the_same_product_bit_for_bit(inputs: int, outputs: int) -> None:
    linear = make_linear(inputs, outputs, torch.bfloat16)
    packed = pack(linear)
    assert isinstance(packed, PackedLinear) and not list(packed.parameters())
    for shape in ((1, inputs), (1, 1, inputs), (2, 3, inputs), (7, inputs), (200, inputs), (0, inputs)):
        x = torch.randn(shape).bfloat16()
        with torch.inference_mode():
            assert torch.equal(packed(x), F.linear(x, linear.weight)), shape
    wide = torch.randn(5, inputs + 3).bfloat16()[:, 1 : inputs + 1]
    assert torch.equal(packed(wide), F.linear(wide, linear.weight))


def test_other_modules_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[nn.Module] = [make_linear(64, 64, dtype) for dtype in (torch.float32, torch.float16)]
    for module in [*others, nn.Identity(), nn.Linear(8, 8, dtype=torch.bfloat16)]:
        assert pack(module) is module
    monkeypatch.setattr("model.linear.packs", lambda weight: False)
    linear = make_linear(64, 64, torch.bfloat16)
    assert pack(linear) is linear


def test_a_build_without_the_operator_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not packs(BFLOAT16)
