"""Where the kernels run, and what is said where they do not."""

import pytest
import torch

from model.kernels import launching
from model.kernels.launching import unsupported
from model.target import Target
from tests.model.kernels.running import imports_triton


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


@pytest.mark.parametrize("module", ["model.quant.backends", "model.quant.expert", "model.kernels.step"])
def test_triton_is_not_imported_before_it_is_needed(module: str) -> None:
    assert not imports_triton(module)
