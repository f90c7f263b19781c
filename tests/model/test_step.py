"""A whole step by Triton's kernels, in its interpreter and on a GPU if there is one.

`tests/runtime/gpu/test_decode.py` has more, with plain PyTorch in place of the kernels.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.kernels import launching
from runtime.gpu.decoder import unfit
from tests.model.kernels.running import run_cases, triton
from tests.model.whole_step_cases import CONFIG

CASES = "tests/model/whole_step_cases.py"


@triton
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_cases(CASES, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.gpu
@triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    if reason := unfit(CONFIG, torch.device("cuda"), torch.float16):
        pytest.skip(f"Triton's kernels: {reason}")
    run_cases(CASES, tmp_path)


def test_unfit_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    half = torch.float16
    assert unfit(CONFIG, cpu, half) == "needs a CUDA device, not cpu"
    monkeypatch.setattr(launching, "unsupported", lambda target, dtype: None)
    assert unfit(CONFIG, cpu, half) is None
    assert unfit(replace(CONFIG, ffn=40), cpu, half) == "hidden 64 and ffn 40 are not multiples of 16"
    assert str(unfit(replace(CONFIG, head_dim=8), cpu, half)).startswith("head_dim 8 is not a power of two")
