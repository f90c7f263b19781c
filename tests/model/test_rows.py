"""Products with few row counts: each row is computed once, and memory does not grow with lengths."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear import PackedLinear, linear, packs
from model.rows import COUNTS, PIECE, in_pieces, rows_filled_up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_the_counts_are_ever_asked_for(dtype: torch.dtype) -> None:
    asked = set()

    def product(x: Tensor) -> Tensor:
        asked.add(x.shape[0])
        return x[:, :1] * 2

    for M in range(1, 3 * PIECE):
        x = torch.arange(M, dtype=torch.float32).remainder(200).to(dtype)[:, None].repeat(1, 3)
        assert torch.equal(in_pieces(product, x), x[:, :1] * 2)
    assert asked == set(COUNTS)


def test_filling_up_costs_little() -> None:
    for M in range(65, 3 * PIECE):
        assert M <= rows_filled_up(M) <= 1.5 * M
    assert all(rows_filled_up(M) - M < 8 for M in range(2, 33))


@pytest.mark.parametrize("shape", [(1,), (2,), (17,), (256,), (300,), (2, 150), (3, 1), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 64, generator=generator).to(dtype)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    y = linear(x, weight)
    assert y.shape == (*shape, 48) and y.dtype == dtype
    # each element is rounded once from a sum in float32, taken in any order
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=2**-7, atol=2e-5 + 2**-6)
    if dtype == torch.float32:
        assert torch.equal(y, F.linear(x, weight))
    if packs(weight):
        torch.testing.assert_close(PackedLinear(weight)(x), y)


GROWTH = """
import torch
from model.linear import linear

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096

weight = torch.randn(512, 256, dtype=torch.bfloat16)
for rows in range(1, 260, 4):  # all counts
    linear(torch.randn(rows, 256, dtype=torch.bfloat16), weight)
before = resident()
for rows in range(1, 300):
    linear(torch.randn(rows, 256, dtype=torch.bfloat16), weight)
print((resident() - before) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_lengths() -> None:
    """Without pieces, it would grow by 150 MiB here."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 8
