"""The kernels, as they are launched, compiled for GPUs that need not be there. `test_matrices.py` runs these
tests in a process of its own.

The interpreter accepts what a compiler may not, and knows nothing of registers. A program that runs out of
them keeps numbers in memory, and the size of its stack shows that.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from model.kernels import experts, launching, matrices, step
from model.kernels.experts import BlobLayout, experts_by_slot
from model.quant.backends.fused import Fused
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields

POINTERS = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int64: "*i64", torch.int32: "*i32",
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
}  # fmt: skip

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)  # `widely_compiled_cases.py` tries all of them
BROADLY = (80, 90)  # in every format; elsewhere in one, which is every kernel too
SHARED = {75: 64 << 10}  # bytes that a program may have of it; from 8.0 on every GPU has at least
LEAST_SHARED = 99 << 10

Key = tuple[Any, ...]


def key_of(kernel: Any, tensors: Sequence[Tensor | int], values: dict[str, float]) -> Key:
    """What Triton compiles again for: dtypes, constants, and whether integers are 1 or divisible by 16,
    unless the kernel forbids that."""
    numbers = [
        None if isinstance(t, Tensor) or parameter.do_not_specialize else (t == 1, t % 16 == 0)
        for t, parameter in zip(tensors, kernel.params, strict=False)
    ]
    kinds = [t.dtype if isinstance(t, Tensor) else None for t in tensors]
    return kernel.fn.__name__, tuple(kinds), tuple(numbers), tuple(sorted(values.items()))


class Noting:
    """In place of `launch`: notes what would have to be compiled."""

    def __init__(self) -> None:
        self.keys: set[Key] = set()

    def __call__(self, kernel: Any, grid: tuple[int, ...], *tensors: Tensor | int, **values: float) -> None:
        self.keys.add(key_of(kernel, tensors, values))


class Compiler:
    """In place of `launch`: compiles the kernel, and reads how large its stack is."""

    def __init__(self, folder: Path, capability: int) -> None:
        self.folder, self.capability = folder, capability
        self.dtypes = [torch.float16] if capability < 80 else [torch.bfloat16, torch.float16]
        self.stacks: dict[str, int] = {}  # by kernel: bytes, the most of all its launches
        self.widths: list[int] = []  # bits of each load of a thread, in order, in the last kernel

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
        assert compiled.metadata.shared <= SHARED.get(self.capability, LEAST_SHARED), kernel
        assert not re.search(r"(fma|mul)(\.rn)?\.ftz", compiled.asm["ptx"]), kernel  # codes are denormal
        file = self.folder / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage, machine_code = (
            subprocess.run([TOOL, flag, file], capture_output=True, text=True, check=True, timeout=60).stdout
            for flag in ("-res-usage", "-sass")
        )
        self.widths = [int(width or 32) for width in re.findall(r" LDG\.E(?:\.U?(\d+))?", machine_code)]
        stack = max(int(size) for size in re.findall(r"STACK:(\d+)", usage))
        self.stacks[kernel.fn.__name__] = max(stack, self.stacks.get(kernel.fn.__name__, 0))

    def check(self, *kernels: str) -> None:
        """These have been compiled, and keep everything in registers."""
        assert set(self.stacks) == set(kernels)
        assert not any(self.stacks.values()), self.stacks


few = pytest.mark.parametrize("compiler", (75, *BROADLY, 120), indirect=True)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Compiler:
    capability = request.param
    compiler = Compiler(tmp_path, capability)
    monkeypatch.setattr(launching, "capability_of", lambda device: divmod(capability, 10))
    for module in (experts, matrices, step):
        monkeypatch.setattr(module, "launch", compiler)
    return compiler


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> Noting:
    noting = Noting()
    for module in (experts, matrices, step):
        monkeypatch.setattr(module, "launch", noting)
    return noting


def make_product(text: str, shape: tuple[int, int] = (4096, 4096)) -> Fused:
    spec = QuantSpec.parse(text)
    fields = matrix_fields("", shape, spec)
    memory = torch.empty(fields[-1].end, dtype=torch.uint8)
    return Fused(spec, shape, {field.name[1:]: field.view(memory) for field in fields})


@few
def test_a_matrix(compiler: Compiler) -> None:
    formats = ("3", "2", "4", "8") if compiler.capability in BROADLY else ("3",)
    for text, dtype in zip(formats, 4 * compiler.dtypes, strict=False):
        product = make_product(text)
        for M in (1, 4):
            product(torch.empty(M, 4096, dtype=dtype))
        matrices.expand(product.matrix, 0, torch.empty(4096, 4096, dtype=dtype))
    compiler.check("multiply_one", "multiply_few", "expand")


@few
def test_all_codes_of_one_row_are_under_way_at_once(compiler: Compiler) -> None:
    """A thread loads 64 codes of 4 rows and one or two blocks, 16 bytes at a time, before it loads x, 8 bytes
    at a time."""
    for bits, blocks in ((8, 1), (4, 2), (3, 2), (2, 2)) if compiler.capability in BROADLY else ((4, 2),):
        make_product(str(bits))(torch.empty(1, 4096, dtype=compiler.dtypes[0]))
        assert compiler.widths.count(128) >= 2 * bits * blocks  # steps may be such loads, too
        assert compiler.widths.count(64) == 16
        assert 128 not in compiler.widths[compiler.widths.index(64) :]


def compute_experts(text: str, D: int, ffn: int, dtype: torch.dtype, absent: bool = False) -> None:
    layout = BlobLayout(QuantSpec.parse(text), D, ffn)
    end = matrix_fields("w2", (D, ffn), layout.spec, layout.w2_offset(dtype), dtype)[-1].end
    pool = torch.empty(1, end, dtype=torch.uint8)
    slots, weights = torch.zeros(2, dtype=torch.int32), torch.ones(2)
    experts_by_slot(torch.empty(1, D, dtype=dtype), pool, slots, weights, layout, absent=absent)


@few
def test_experts(compiler: Compiler) -> None:
    formats = ("16", "8", "4", "3g128", "2") if compiler.capability in BROADLY else ("16", "3g128")
    for text in formats:
        compute_experts(text, 4096, 14336, compiler.dtypes[0])
    compute_experts("3g128", 4096, 14336, compiler.dtypes[0], absent=True)
    compiler.check("gate_up", "down")


def small_kernels(dtype: torch.dtype, capacity: int, D: int = 4096, H: int = 32) -> None:
    x = torch.empty(1, D, dtype=dtype)
    table = torch.empty(capacity, 128, dtype=dtype)
    cache, position = torch.empty(1, 8, capacity, 128, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    numbers = torch.zeros(2, dtype=torch.int64)
    step.fetch(numbers, numbers)
    step.add_and_norm(x, x, x[0], torch.zeros(1))
    qkv = torch.empty(1, (H + 16) * 128, dtype=dtype)
    q = step.rotate_and_append(qkv, table, table, cache, cache, position)
    step.attend(q, cache, cache, position)
    codes, scales = cache.to(torch.int8), torch.empty(1, 8, capacity)
    step.rotate_and_append(qkv, table, table, codes, codes, position, (scales, scales))
    step.attend(q, codes, codes, position, (scales, scales))
    step.route(x, torch.empty(24, D), 8, 2)


STEP = ("fetch", "add_and_norm", "rotate_and_append", "attend_stretch", "attend_sum", "route")


@few
def test_a_step(compiler: Compiler) -> None:
    """Its small kernels. In float32 no GPU has tensor cores for them."""
    for dtype in (compiler.dtypes[0], torch.float32)[: 1 + (compiler.capability in BROADLY)]:
        small_kernels(dtype, 64)
    compiler.check(*STEP)


def test_what_is_compiled_once_serves_every_context_and_number_of_rows(noting: Noting) -> None:
    for capacity in (1, 64, 100, 4096):
        small_kernels(torch.bfloat16, capacity)
    coded = ("rotate_and_append", "attend_stretch")  # in 16 bits and in 8
    assert sorted(key[0] for key in noting.keys) == sorted(STEP + coded)
    noting.keys.clear()
    product = make_product("4")
    for M in (2, 3, 15, 16):
        product(torch.empty(M, 4096, dtype=torch.bfloat16))
    for start in (0, 16, 48):
        matrices.expand(product.matrix, start, torch.empty(4096 - start, 4096, dtype=torch.bfloat16))
    assert sorted(key[0] for key in noting.keys) == ["expand", "multiply_few"]
