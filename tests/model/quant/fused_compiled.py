"""What `test_fused.py` runs in a process of its own: the kernels, as they are launched, compiled for a GPU
that need not be there. The interpreter takes what a compiler may not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from model.quant.backends import fused
from model.quant.backends.fused import ExpertForm, Fused, expert_pair
from model.quant.layout import matrix_fields
from model.quant.spec import QuantSpec

POINTERS = {
    torch.uint8: "*u8", torch.int64: "*i64", torch.int32: "*i32",
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
}  # fmt: skip


def compile_instead(
    kernel: Any, grid: tuple[int, ...], *tensors: Tensor | int, num_warps: int, **values: int
) -> None:
    values["INTERPRETED"] = False
    kinds = [POINTERS[t.dtype] if isinstance(t, Tensor) else "i32" for t in tensors]
    signature = dict(zip(kernel.arg_names, kinds + ["constexpr"] * len(values), strict=True))
    assert set(values) == {name for name, kind in signature.items() if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind[0] == "*"}
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    compiled = compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 << 10, kernel  # every GPU from 8.0 on has that


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused, "launch", compile_instead)
    yield


@pytest.mark.parametrize(("text", "dtype"), [("3", torch.bfloat16), ("2g64", torch.float32)])
def test_a_matrix(text: str, dtype: torch.dtype) -> None:
    spec, shape = QuantSpec.parse(text), (4096, 4096)
    fields = matrix_fields("", shape, spec)
    memory = torch.empty(fields[-1].end, dtype=torch.uint8)
    product = Fused(spec, shape, {field.name[1:]: field.view(memory) for field in fields})
    for M in (1, 4):
        product(torch.empty(M, 4096, dtype=dtype))


def test_experts() -> None:
    form = ExpertForm(QuantSpec(4), 4096, 14336)
    end = matrix_fields("w2", (4096, 14336), form.spec, form.w2_offset)[-1].end
    pool = torch.empty(1, end, dtype=torch.uint8)
    slots, weights = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    expert_pair(torch.empty(1, 4096, dtype=torch.float16), pool, slots, weights, form)
