"""Rotary embedding against multiplication by complex numbers of length one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from model.rope import Rope
from tests.model.oracle import their_config
from tests.model.reference import CPU, GEOMETRIES

FAR = 32768


def as_complex(x: Tensor) -> Tensor:  # [..., K] -> [..., K/2]: dimension i and its partner i + K/2
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half].double(), x[..., half:].double())


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:  # x [..., T, K] -> [..., T, K/2]
    K = x.shape[-1]
    angles = [[position * theta ** (-2 * i / K) for i in range(K // 2)] for position in positions.tolist()]
    return as_complex(x) * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))


@pytest.mark.parametrize("K", [2, 6, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_against_complex_numbers(K: int, theta: float) -> None:
    x = torch.randn(2, 3, 40, K)
    out = Rope.table(50, K, theta, torch.float32, CPU).at(7, 47)(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    torch.testing.assert_close(as_complex(out), turned(x, torch.arange(7, 47), theta), rtol=1e-5, atol=2e-5)


def test_far_out() -> None:
    """In float32, angles near 32 thousand are 0.004 apart. Half of that is lost, and frequencies add some."""
    x = torch.randn(1, 2, 64, 128)
    out = Rope.table(FAR, 128, 1e6, torch.float32, CPU).at(FAR - 64, FAR)(x)
    error = as_complex(out) - turned(x, torch.arange(FAR - 64, FAR), 1e6)
    assert (error.abs() / as_complex(x).abs()).max() < 4e-3


@pytest.mark.parametrize("start", [0, 1000, FAR - 100])
def test_scores_depend_on_distance_alone(start: int) -> None:
    """The product of q at m and k at n is the same for all m and n at the same distance."""
    rope = Rope.table(FAR, 64, 1e6, torch.float32, CPU)
    q, k = torch.randn(64), torch.randn(64)
    scores = [
        [
            torch.dot(rope.at(m, m + 1)(q[None])[0], rope.at(n, n + 1)(k[None])[0])
            for m, n in ((s + 90, s + d), (90, d))
        ]
        for s, d in [(start, 0), (start, 37), (start, 90)]
    ]
    for there, here in scores:
        torch.testing.assert_close(there, here, rtol=0, atol=0.02 if start > 1000 else 2e-3)
    assert abs(scores[0][0] - scores[1][0]) > 0.1


def test_position_zero_turns_nothing() -> None:
    x = torch.randn(1, 1, 1, 16)
    assert torch.equal(Rope.table(4, 16, 1e4, torch.float32, CPU).at(0, 1)(x), x)


def test_table_is_transformers_to_the_bit_far_out() -> None:
    """The network was trained with these roundings. A frequency off by one bit is off by 0.002 here."""
    config = replace(GEOMETRIES["8x7B's ratios"], head_dim=128, context=FAR)
    cos, _ = MixtralRotaryEmbedding(their_config(config))(torch.empty(1), torch.arange(FAR)[None])
    assert torch.equal(Rope.table(FAR, 128, 1e6, torch.float32, CPU).cos, cos[0])


@pytest.mark.parametrize("factor", [1.0, 2.0, 2.5, 3.0, 4.0, 7.3, 8.0, 0.5])
def test_linear_scaling_is_transformers_to_the_bit(factor: float) -> None:
    config = replace(GEOMETRIES["8x7B's ratios"], head_dim=128, context=FAR, rope_factor=factor)
    cos, _ = MixtralRotaryEmbedding(their_config(config))(torch.empty(1), torch.arange(FAR)[None])
    assert torch.equal(Rope.table(FAR, 128, 1e6, torch.float32, CPU, factor).cos, cos[0])


def test_linear_scaling_divides_positions() -> None:
    """A factor of 4 has at position 4 p the rotation that position p has without."""
    plain, scaled = (Rope.table(400, 64, 1e4, torch.float64, CPU, factor) for factor in (1.0, 4.0))
    torch.testing.assert_close(scaled.cos[::4], plain.cos[:100], rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.sin[::4], plain.sin[:100], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_table_is_transformers(name: str) -> None:
    config = GEOMETRIES[name]
    theirs = MixtralRotaryEmbedding(their_config(config))
    cos, sin = theirs(torch.empty(1), torch.arange(config.context)[None])
    ours = Rope.table(config.context, config.head_dim, config.rope_theta, torch.float32, CPU)
    half = config.head_dim // 2
    torch.testing.assert_close(ours.cos, cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        ours.sin, torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1), rtol=0, atol=1e-4
    )


def test_half_precision_rounds_once() -> None:
    """In bfloat16, angles above 256 would be whole numbers. Only their cosines and sines are rounded."""
    wide = Rope.table(5000, 32, 1e6, torch.float32, CPU)
    table = Rope.table(5000, 32, 1e6, torch.bfloat16, CPU)
    assert torch.equal(table.cos, wide.cos.bfloat16()) and torch.equal(table.sin, wide.sin.bfloat16())
