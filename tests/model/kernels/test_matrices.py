"""Products with matrices and experts on a GPU: what the host decides, and in processes of their own the
kernels."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model.kernels import matrices
from model.kernels.experts import BlobLayout
from model.kernels.launching import unsupported
from model.kernels.matrices import PackedMatrix
from model.quant.backends.fused import Fused
from model.quant.spec import QuantSpec
from model.quant.streams import expert_fields, matrix_fields
from model.quant.tensor import QuantizedTensor
from model.target import Target
from tests.model.kernels.running import run_cases, triton
from tests.model.reference import TINY

FILES = ["tests/model/kernels/matrix_cases.py", "tests/model/kernels/expert_cases.py"]
COMPILED = "tests/model/kernels/compiled_cases.py"


@triton
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str, tmp_path: Path) -> None:
    run_cases(file, tmp_path, TRITON_INTERPRET="1")


@triton
def test_compiled_without_a_gpu(tmp_path: Path) -> None:
    run_cases(COMPILED, tmp_path)


@pytest.mark.slow
@triton
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_widely_compiled_without_a_gpu(capability: int, tmp_path: Path) -> None:
    run_cases("tests/model/kernels/widely_compiled_cases.py", tmp_path, f"-k=[{capability}-")


@pytest.mark.gpu
@triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("file", FILES)
def test_on_a_gpu(file: str, tmp_path: Path) -> None:
    if reason := unsupported(Target.of(torch.device("cuda")), torch.float16):
        pytest.skip(f"Triton's kernels: {reason}")
    run_cases(file, tmp_path)


# --- on the host


def test_more_rows_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = QuantSpec(4, 16), (48, 32)
    fields = matrix_fields("", shape, spec)
    apart = {f.name[1:]: f.view(torch.zeros(f.end, dtype=torch.uint8)) for f in fields}
    with pytest.raises(AssertionError, match="scales"):
        Fused(spec, shape, apart)  # streams that do not follow one another
    buffer = torch.randint(128, (fields[-1].end,), dtype=torch.uint8)
    memory = {f.name[1:]: f.view(buffer) for f in fields}
    memory["steps"].fill_(0.01)  # random bytes may be infinite
    product, x = Fused(spec, shape, memory), torch.randn(17, 32)
    launched: list[int | slice] = []
    W = QuantizedTensor.of(spec, shape, memory).dequantize()

    def expand(matrix: PackedMatrix, start: int, out: torch.Tensor) -> None:
        launched.append(slice(start, start + len(out)))
        out.copy_(W[launched[-1]])

    monkeypatch.setattr(matrices, "multiply_one", lambda x, matrix: launched.append(1))
    monkeypatch.setattr(matrices, "multiply_few", lambda x, matrix: launched.append(len(x)))
    monkeypatch.setattr(matrices, "expand", expand)
    for M in (1, 2, 16):
        product(x[:M])
    assert launched == [1, 2, 16]
    for block, rows in ((1 << 20, [48]), (33 * 32, [32, 16]), (1, [16, 16, 16])):  # by 16 rows
        monkeypatch.setattr(matrices, "BLOCK", block)
        launched.clear()
        torch.testing.assert_close(product(x), F.linear(x, W))
        assert [len(W[part]) for part in launched] == rows and launched[0].start == 0
        assert product(x[:0]).shape == (0, 48)


def test_one_row_is_read_from_aligned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels load 8 bytes of x at a time."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(matrices, "launch", lambda kernel, grid, x, *rest, **values: seen.append(x))
    monkeypatch.setitem(sys.modules, "model.kernels.matrix_kernels", SimpleNamespace(multiply_one=None))
    matrix = PackedMatrix(torch.zeros(0, dtype=torch.uint8), QuantSpec(4), (16, 64))
    numbers = torch.randn(1, 131).bfloat16()
    for x in (numbers[:, :64], numbers[:, 1:65], numbers[:, 2:66], torch.randn(64, 2).bfloat16().T[1:]):
        matrices.multiply_one(x, matrix)
        assert seen[-1].data_ptr() % 8 == 0 and seen[-1].is_contiguous() and torch.equal(seen[-1], x)
    assert seen[0].data_ptr() == numbers.data_ptr()  # no copy where none is needed


@pytest.mark.parametrize("text", ["16", "8g16", "4g16", "3g16", "2g16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_place_of_w2_is_the_layouts(text: str, dtype: torch.dtype) -> None:
    spec = QuantSpec.parse(text)
    config = replace(TINY, ffn=96)
    w2 = next(field for field in expert_fields(config, spec, dtype=dtype) if field.name.startswith("w2."))
    assert BlobLayout(spec, config.hidden, config.ffn).w2_offset(dtype) == w2.offset
