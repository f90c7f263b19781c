"""HQQ (mobiusml.github.io/hqq_blog): from a matrix of floats to the nearest one that the format has.

A group's scale spans from its lowest to its highest weight. The hqq package's solver finds its zero. Scale
and zero are then rounded to what the format can store, and every weight takes the code that is nearest under
the rounded ones. So their rounding costs next to nothing.

The solver gets a few rows at a time. It goes over its temporaries some ten times, which is several times
faster while they stay in the cache. It solves for each group by itself, except that it stops when the mean
error over all its rows no longer falls.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

import torch
from torch import Tensor

from model.errors import ModelError
from model.quant.packing import PLANES, pack
from model.quant.spec import QuantSpec
from model.quant.streams import CODES, STEPS
from model.quant.tensor import QuantizedTensor, scale_values, zero_values

CPU_SLICE = 1 << 17  # weights: with the solver's temporaries, a few megabytes
GPU_SLICE = 1 << 24  # large enough to keep a GPU busy, small enough for any
LEAST, MOST = 2.0**-100, 2.0**100  # a group whose range is not between these takes the plain zero
NORM = {"lp_norm": 1, "beta": 1e1, "kappa": 1.01, "iters": 20}  # hqq's own, except lp_norm: see `solve`

Result = TypeVar("Result")


def quantize(
    weight: Tensor, spec: QuantSpec, name: str = "matrix", pool: Executor | None = None
) -> tuple[QuantizedTensor, float]:
    """Quantize `weight` [N, K] on its device. Returns it in this format, and its error |W - W'| / |W|, in
    Frobenius norms.

    The threads of `pool` work on slices of rows, best with `torch.set_num_threads(1)`, so that each keeps to
    a core. The same input gives the same bytes on the same machine, with any number of threads and without a
    pool. `name` is for messages. Raises `ModelError` if the format does not take the shape, or if weights are
    not finite.
    """
    assert spec.quantized, spec
    spec.check(name, weight.shape)
    N, K = weight.shape
    J = K // spec.group_size
    weight = weight.detach()
    scales = torch.empty(N, J, dtype=torch.float32, device=weight.device)
    zeros = torch.empty(N, J, dtype=torch.uint8, device=weight.device)

    def first(rows: slice) -> None:
        scales[rows], zeros[rows] = solve(weight[rows].float(), spec, name)

    every(first, slices(weight), pool)
    scale_bytes, steps = quantize_scales(scales, spec)
    scale, zero = scale_values(scale_bytes, steps, spec)[..., None], zero_values(zeros, spec)[..., None]
    planes = {
        stream: torch.empty(N, K * width // 8, dtype=torch.uint8, device=weight.device)
        for stream, width in zip(CODES, PLANES[spec.bits], strict=False)
    }

    def second(rows: slice) -> Tensor:  # norms of the difference and of the weights [2]
        w = weight[rows].float().view(-1, J, spec.group_size)
        codes = nearest(w, scale[rows], zero[rows], spec)
        packed = pack(codes.to(torch.uint8).view(-1, K), spec.bits, spec.group_size)
        for plane, part in zip(planes.values(), packed, strict=True):
            plane[rows] = part
        difference = codes.sub_(zero[rows]).mul_(scale[rows]).sub_(w)
        return torch.stack([torch.linalg.vector_norm(t) for t in (difference, w)])

    norms = torch.stack(every(second, slices(weight), pool)).double()  # [slices, 2]
    lost, whole = norms.square().sum(0).sqrt().tolist()
    streams = {**planes, "scales": scale_bytes, "zeros": zeros, "steps": steps}
    return QuantizedTensor.of(spec, (N, K), streams), lost / whole if whole else 0.0


def every(work: Callable[[slice], Result], parts: Iterable[slice], pool: Executor | None) -> list[Result]:
    """Work on all parts, and return the results in order. Each thread has to turn gradients off by itself."""
    without_gradients = torch.no_grad()(work)
    return list((pool.map if pool else map)(without_gradients, parts))


def slices(weight: Tensor) -> Iterator[slice]:
    """The rows that are solved together.

    >>> list(slices(torch.empty(80, 4096)))
    [slice(0, 32, None), slice(32, 64, None), slice(64, 80, None)]
    """
    N, K = weight.shape
    rows = max((CPU_SLICE if weight.device.type == "cpu" else GPU_SLICE) // K, 1)
    return (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def solve(w: Tensor, spec: QuantSpec, name: str) -> tuple[Tensor, Tensor]:  # w [n, K] float32
    """Each group's scale [n, J] float32, and its zero [n, J] uint8, as the format stores it.

    hqq's thresholds are absolute. It caps the inverse of scales at 20000, gives up groups narrower than
    0.0001, and shrinks residuals in every iteration, those below a threshold to 0. So every group is first
    scaled by a power of two to a range between 1/32 and 1/16. Then none of the thresholds acts, and large and
    small weights are treated alike.

    No residual exceeds the range: hqq's next zero is a mean of `code - w / scale`, which puts the lowest
    weight at code 0 or above and the highest at the last code or below. Residuals up to 1 / (beta kappa^19) =
    0.083 are shrunk to 0 for every norm. So a norm of 1 gives the iterations of hqq's own 0.7, and
    computes no powers.
    """
    from hqq.core.optimize import optimize_weights_proximal_legacy  # slow to import, and needed only here

    top, units = 2**spec.bits - 1, 2 ** (8 - spec.bits)
    groups = w.view(-1, spec.group_size)
    low, high = groups.aminmax(dim=1, keepdim=True)  # [groups, 1]
    spread = high - low
    if not bool(spread.isfinite().all()):
        raise ModelError(f"{name}: has weights that are not finite numbers; the source is damaged")

    # The zero of a group on one side of 0 would lie outside the codes. So such a group spans from 0.
    scale = (high.clamp(min=0) - low.clamp(max=0)) / top
    zero = torch.where(scale > 0, -low.clamp(max=0) / scale, 0)
    solved = (low <= 0) & (high >= 0) & (spread > LEAST) & (spread < MOST)
    lift = torch.where(solved, lifting(spread), 0)
    inverse = torch.where(solved, top / (spread * lift), 1)
    _, _, optimal = optimize_weights_proximal_legacy(
        groups * lift, inverse, zero, [0, top], axis=1, device=str(w.device), opt_params=NORM
    )
    zero = torch.where(solved, optimal.float(), zero)
    zero_bytes = (zero * units).round().clamp(0, 255).to(torch.uint8)
    return scale.view(w.shape[0], -1), zero_bytes.view(w.shape[0], -1)


def lifting(spread: Tensor) -> Tensor:
    """The power of two that brings each spread, between 2^-100 and 2^100, to at least 1/32 and below 1/16.

    >>> spread = torch.tensor([0.05, 0.0625, 3.0, 1e-20])
    >>> lifting(spread), spread * lifting(spread)
    (tensor([1.0000e+00, 5.0000e-01, 1.5625e-02, 4.6117e+18]), tensor([0.0500, 0.0312, 0.0469, 0.0461]))
    """
    exponent = -4 - torch.frexp(spread).exponent.clamp(-100, 101)  # spread = mantissa 2^exponent
    return ((exponent + 127) << 23).view(torch.float32)  # by its bits, so that no library rounds it


def quantize_scales(scales: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:  # [N, J] float32
    """Scales as multiples, bytes [N, J], of steps, one for every `meta_group_size` scales.

    A multiple is rounded to the nearest, at 8 bits upwards: there, clipping a group's largest weights would
    cost more than a coarser scale. Only a scale of 0 becomes 0.

    hqq itself cannot do this. Its smallest step is 1/20000, while the scales of 8-bit weights are near
    0.0004.

    >>> quantize_scales(torch.tensor([[0.51, 0.1001, 0.0001, 0.0]]), QuantSpec(4, 16, 16))
    (tensor([[255,  50,   1,   0]], dtype=torch.uint8), tensor([0.0020, 0.0000, 0.0000, 0.0000]))
    """
    count = -(-scales.numel() // spec.meta_group_size)
    padded = scales.new_zeros(-(-count // STEPS) * STEPS, spec.meta_group_size)
    padded.view(-1)[: scales.numel()] = scales.flatten()
    steps = padded.amax(dim=1) / 255  # [count rounded up]
    each = steps.repeat_interleave(spec.meta_group_size)[: scales.numel()].view(scales.shape)
    multiples = torch.where(each > 0, scales / each, 0)
    multiples = multiples.ceil() if spec.bits == 8 else multiples.round()
    return multiples.clamp(min=(scales > 0).float(), max=torch.full_like(scales, 255)).to(torch.uint8), steps


def nearest(w: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """The best code for each weight, as float32. Shapes broadcast. The code is 0 where the scale is 0."""
    return torch.where(scale > 0, w / scale + zero, 0).round_().clamp_(0, 2**spec.bits - 1)
