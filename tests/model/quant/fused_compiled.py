"""What `test_fused.py` runs in a process of its own: the kernels, as they are launched, compiled for a GPU
that need not be there. The interpreter takes what a compiler may not, and knows nothing of registers: what a
program keeps in memory for want of them is its stack, and shows."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from model.quant.backends import fused, step
from model.quant.backends.fused import ExpertForm, Fused, expert_pair
from model.quant.layout import matrix_fields
from model.quant.spec import QuantSpec

POINTERS = {
    torch.uint8: "*u8", torch.int64: "*i64", torch.int32: "*i32",
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
}  # fmt: skip


TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiler:
    """In place of `fused.launch`."""

    def __init__(self, folder: Path, capability: int) -> None:
        self.folder, self.capability = folder, capability
        self.stacks: dict[str, int] = {}  # by kernel: bytes, the most of all its launches

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *tensors: Tensor | int,
        num_warps: int,
        num_stages: int = 3,
        **values: float,
    ) -> None:
        values["INTERPRETED"] = False
        kinds = [POINTERS[t.dtype] if isinstance(t, Tensor) else "i32" for t in tensors]
        signature = dict(zip(kernel.arg_names, kinds + ["constexpr"] * len(values), strict=True))
        assert set(values) == {name for name, kind in signature.items() if kind == "constexpr"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind[0] == "*"}
        source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
        compiled = compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        assert compiled.metadata.shared <= 99 << 10, kernel  # every GPU from 8.0 on has that
        assert not re.search(r"(fma|mul)(\.rn)?\.ftz", compiled.asm["ptx"]), kernel  # codes are denormal
        file = self.folder / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [TOOL, "-res-usage", file]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        stack = max(int(size) for size in re.findall(r"STACK:(\d+)", usage))
        self.stacks[kernel.fn.__name__] = max(stack, self.stacks.get(kernel.fn.__name__, 0))


@pytest.fixture(params=[80, 90])
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Compiler:
    compiler = Compiler(tmp_path, request.param)
    monkeypatch.setattr(fused, "launch", compiler)
    monkeypatch.setattr(step, "launch", compiler)
    return compiler


@pytest.mark.parametrize(("text", "dtype"), [("3", torch.bfloat16), ("2g64", torch.float16)])
def test_a_matrix(text: str, dtype: torch.dtype, compiler: Compiler) -> None:
    spec, shape = QuantSpec.parse(text), (4096, 4096)
    fields = matrix_fields("", shape, spec)
    memory = torch.empty(fields[-1].end, dtype=torch.uint8)
    product = Fused(spec, shape, {field.name[1:]: field.view(memory) for field in fields})
    for M in (1, 4):
        product(torch.empty(M, 4096, dtype=dtype))
    product.expand(0, torch.empty(4096, 4096, dtype=dtype))
    assert compiler.stacks == {"multiply_one": 0, "multiply_few": 0, "expand": 0}


@pytest.mark.parametrize("text", ["16", "4", "3g128", "2"])
def test_experts(text: str, compiler: Compiler) -> None:
    form, dtype = ExpertForm(QuantSpec.parse(text), 4096, 14336), torch.bfloat16
    end = matrix_fields("w2", (4096, 14336), form.spec, form.w2_offset(dtype), dtype)[-1].end
    pool = torch.empty(1, end, dtype=torch.uint8)
    slots, weights = torch.zeros(2, dtype=torch.int32), torch.ones(2)
    expert_pair(torch.empty(1, 4096, dtype=dtype), pool, slots, weights, form)
    assert compiler.stacks == {"gate_up": 0, "down": 0}


def test_a_step(compiler: Compiler) -> None:
    """Its small kernels."""
    D, H = 4096, 32
    x = torch.empty(1, D, dtype=torch.bfloat16)
    table = torch.empty(64, 128, dtype=x.dtype)
    cache, position = torch.empty(1, 8, 64, 128, dtype=x.dtype), torch.zeros(1, dtype=torch.int64)
    step.add_and_norm(x, x, x[0], torch.zeros(1))
    qkv = torch.empty(1, (H + 16) * 128, dtype=x.dtype)
    q = step.rotate_and_append(qkv, table, table, cache, cache, position)
    step.attend(q, cache, cache, position)
    step.route(x, torch.empty(24, D), 8, 2)
    kernels = "add_and_norm", "rotate_and_append", "attend_stretch", "attend_sum", "route"
    assert compiler.stacks == dict.fromkeys(kernels, 0)
