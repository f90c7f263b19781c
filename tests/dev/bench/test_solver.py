"""The comparison of our solver with hqq, on a matrix that takes no time."""

from typing import Any

import pytest
import torch

from dev.bench import solver
from model.quant.spec import QuantSpec


def test_both_solve_the_same_matrix() -> None:
    result: dict[str, Any] = solver.compare(torch.randn(64, 512) * 0.02, QuantSpec(4), 1)
    assert result["error"] == pytest.approx(result["hqq_error"], rel=0.02)
    assert result["speedup"] == result["hqq_seconds"] / result["seconds"]
