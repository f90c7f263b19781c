"""The small kernels of a step: what the host decides, and in processes of their own the kernels."""

from pathlib import Path

import pytest
import torch

from model.kernels import step
from model.kernels.launching import unsupported
from model.target import Target
from tests.model.kernels.running import run_cases, triton

CASES = "tests/model/kernels/step_cases.py"


@triton
def test_in_the_interpreter(tmp_path: Path) -> None:
    run_cases(CASES, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.gpu
@triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    if reason := unsupported(Target.of(torch.device("cuda")), torch.float16):
        pytest.skip(f"Triton's kernels: {reason}")
    run_cases(CASES, tmp_path)


# --- on the host


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"heads": 48, "hidden": 6144}, None),  # 8x22B
        ({"head_dim": 16, "heads": 8, "experts": 1, "chosen": 1}, None),
        ({"head_dim": 8}, "head_dim 8 is not a power of two from 16 to 256"),
        ({"head_dim": 80}, "head_dim 80 is not"),
        ({"head_dim": 512}, "head_dim 512 is not"),
        ({"heads": 36}, "36 query heads for 8 kv heads"),
        ({"heads": 136}, "136 query heads for 8 kv heads are not 1 to 16 for each"),
        ({"hidden": 40000}, "hidden 40000 is more than 32768"),
        ({"experts": 65}, "2 of 65 experts"),
        ({"chosen": 9}, "9 of 8 experts"),
    ],
)
def test_what_does_not_fit(change: dict[str, int], reason: str | None) -> None:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 4096, "experts": 8, "chosen": 2}
    found = step.unfit(**(shape | change))
    assert found is None if reason is None else reason in str(found)


def test_tiles_are_powers_of_two() -> None:
    for K in (16, 32, 64, 128, 256):
        for tensor_cores, size in ((False, 4), (True, 2)):  # bytes of a number at most
            tile = step.tile_positions(K, tensor_cores)
            assert tile >= 16 and tile & (tile - 1) == 0 and tile * K * size <= 1 << 14
    for experts in (1, 2, 8, 16, 32, 64):
        columns = step.gate_columns(experts)
        assert columns & (columns - 1) == 0 and columns * experts <= 1 << 15


def test_shapes_are_checked() -> None:
    k = torch.zeros(1, 2, 8, 16)
    position, q = torch.zeros(1, dtype=torch.int64), torch.zeros(4, 16)
    for wrong in (
        lambda: step.attend(torch.zeros(3, 16), k, k, position),  # 3 heads for 2
        lambda: step.attend(q.bfloat16(), k, k, position),
        lambda: step.attend(q, k, k[:, :, :4], position),
        lambda: step.attend(q, k[:, :, ::2], k[:, :, ::2], position),  # not contiguous
        lambda: step.attend(q, k.expand(2, 2, 8, 16), k.expand(2, 2, 8, 16), position),  # a batch of 2
        lambda: step.attend(q, k, k, position.int()),
        lambda: step.rotate_and_append(torch.zeros(1, 4 * 16), q, q, k, k, position),  # no queries
        lambda: step.route(torch.zeros(1, 4), torch.zeros(7, 4), 8, 2),
        lambda: step.route(torch.zeros(1, 4), torch.zeros(8, 4).bfloat16(), 8, 2),
        lambda: step.add_and_norm(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(4), torch.zeros(1)),
    ):
        with pytest.raises(AssertionError):
            wrong()
