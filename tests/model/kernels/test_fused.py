"""The kernels for GPUs: what is decided on the host; and in processes of their own what needs Triton, which
reads whether to interpret when it is imported, so that who imports it here would decide for other tests."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.kernels import launching, matrices
from model.kernels.experts import BlobLayout
from model.kernels.launching import unsupported
from model.kernels.matrices import PackedMatrix
from model.quant.backends.fused import Fused
from model.quant.spec import QuantSpec
from model.quant.streams import expert_fields, matrix_fields
from model.quant.tensor import QuantizedTensor
from model.target import Target
from tests.model.reference import TINY

ROOT = Path(__file__).resolve().parents[3]
CASES = "tests/model/kernels/fused_cases.py"
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_cases(file: str, tmp_path: Path, **environment: str) -> None:
    """All tests of a file that pytest does not find by itself."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    ours = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path), **environment}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=inherited | ours, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-20000:] + done.stderr[-5000:]
    assert "skipped" not in done.stdout, done.stdout


@triton
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_cases(CASES, tmp_path, TRITON_INTERPRET="1")


@triton
def test_compiled_without_a_gpu(tmp_path: Path) -> None:
    run_cases("tests/model/kernels/fused_compiled.py", tmp_path)


@pytest.mark.gpu
@triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    if reason := unsupported(Target.of(torch.device("cuda"))):
        pytest.skip(f"Triton's kernels: {reason}")
    run_cases(CASES, tmp_path)


# --- on the host


def test_more_rows_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = QuantSpec(4, 16), (48, 32)
    fields = matrix_fields("", shape, spec)
    apart = {f.name[1:]: f.view(torch.zeros(f.end, dtype=torch.uint8)) for f in fields}
    with pytest.raises(AssertionError, match="scales"):
        Fused(spec, shape, apart)  # streams that do not follow one another
    buffer = torch.randint(128, (fields[-1].end,), dtype=torch.uint8)
    memory = {f.name[1:]: f.view(buffer) for f in fields}
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


@pytest.mark.parametrize("text", ["16", "8g16", "4g16", "3g16", "2g16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_place_of_w2_is_the_layouts(text: str, dtype: torch.dtype) -> None:
    spec = QuantSpec.parse(text)
    w2 = next(field for field in expert_fields(TINY, spec, dtype=dtype) if field.name.startswith("w2."))
    assert BlobLayout(spec, TINY.hidden, TINY.ffn).w2_offset(dtype) == w2.offset


def test_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported(Target.of(torch.device("cpu"))) == "needs a CUDA device, not cpu"
    cuda = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unsupported(Target.of(cuda)) == "needs a CUDA device, and there is none here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and this one has 7.5" in str(unsupported(Target.of(cuda)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    assert "pip install triton" in str(unsupported(Target.of(cuda)))
    monkeypatch.setattr(launching, "find_spec", lambda name: name)
    monkeypatch.setattr(launching, "untried", lambda device: f"tried {device}")
    assert unsupported(Target.of(cuda)) == "tried cuda:1"


@pytest.mark.parametrize("text", ["Failed to find C compiler.\nSet CC", ""])
def test_where_kernels_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tried: list[torch.device] = []

    def compile_one(device: torch.device) -> None:
        tried.append(device)
        if len(tried) == 1:
            raise RuntimeError(text)

    monkeypatch.setattr(launching, "compile_one", compile_one)
    launching.uncompiled.cache_clear()
    try:
        for _ in range(3):
            said = launching.uncompiled(torch.device("cpu"))  # stands for a GPU
            assert said and f"({text.partition(chr(10))[0] or 'RuntimeError'}); install a C compiler" in said
        assert tried == [torch.device("cpu")], "once for a device"
        assert launching.uncompiled(torch.device("cpu", 0)) is None
    finally:
        launching.uncompiled.cache_clear()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory\nCompile with this and that"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_short_memory_is_not_kept_for_a_compiler_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def compile_one(device: torch.device) -> None:
        if left.pop(0):
            raise error

    left = [True, False]
    monkeypatch.setattr(launching, "compile_one", compile_one)
    launching.uncompiled.cache_clear()
    try:
        said = str(launching.untried(torch.device("cpu")))  # stands for a GPU
        assert "no memory for that" in said and "compiler" not in said and "\n" not in said
        assert launching.untried(torch.device("cpu")) is None and not left
        assert launching.untried(torch.device("cpu")) is None  # that is kept
    finally:
        launching.uncompiled.cache_clear()


def test_triton_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, model.quant.backends, model.quant.expert; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "False\n", done.stderr
