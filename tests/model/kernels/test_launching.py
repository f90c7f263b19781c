"""Where the kernels run, and what is said where they do not."""

import pytest
import torch

from model.kernels import launching
from model.kernels.launching import unsupported
from model.target import Target
from tests.model.kernels.running import imports_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(dtype: torch.dtype = torch.float16) -> str | None:
        return unsupported(Target.of(cuda), dtype)

    assert unsupported(Target.of(torch.device("cpu")), torch.float32) == "needs a CUDA device, not cpu"
    cuda = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why() == "needs a CUDA device, and there is none here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for dtype in (torch.float16, torch.float32):
        assert why(dtype) == (
            "needs a GPU of compute capability 7.5, and this one has 7.0; there is no other way"
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why(torch.bfloat16) == (
        "needs a GPU of compute capability 8.0 for bfloat16, and this one has 7.5; use --dtype float16"
    )
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    for platform, package in (("linux", "triton"), ("win32", "triton-windows")):
        monkeypatch.setattr(launching.sys, "platform", platform)
        assert str(why()).endswith(f"; pip install {package}")
    monkeypatch.setattr(launching, "find_spec", lambda name: name)
    monkeypatch.setattr(launching, "untried", lambda device: f"tried {device}")
    assert why() == why(torch.float32) == "tried cuda:1"


def test_a_hypothetical_gpu_is_judged_by_its_capability() -> None:
    for capability, fit in (((7, 0), ()), ((7, 5), DTYPES[:2]), ((8, 0), DTYPES), ((12, 0), DTYPES)):
        target = Target.hypothetical(capability)
        assert [dtype for dtype in DTYPES if unsupported(target, dtype) is None] == list(fit)


def test_where_tensor_cores_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {None: DTYPES[1:], (7, 5): (), (8, 0): DTYPES[1:]}
    for capability, fit in cases.items():
        monkeypatch.setattr(launching, "capability_of", lambda device, found=capability: found)
        assert [dtype for dtype in DTYPES if launching.uses_tensor_cores(torch.empty(1, dtype=dtype))] == [
            *fit
        ]


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


@pytest.mark.parametrize("module", ["model.quant.backends", "model.quant.expert", "model.kernels.step"])
def test_triton_is_not_imported_before_it_is_needed(module: str) -> None:
    assert not imports_triton(module)
