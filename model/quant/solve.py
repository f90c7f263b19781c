"""HQQ (mobiusml.github.io/hqq_blog): from a matrix of floats to the nearest one that the format has.

A group's scale spans from its lowest to its highest weight. The hqq package's solver finds its zero. Scale
and zero are then rounded to what the format can store, and every weight takes the code that is nearest under
the rounded ones. So their rounding costs next to nothing.

The solver gets a few rows at a time. It goes over its temporaries some ten times, which is several times
faster while they stay in the cache. It solves for each group by itself, except that it stops when the mean
error over all its rows no longer falls.
"""

from collections.abc import Iterator
from concurrent.futures import Executor

import torch
from torch import Tensor

from model.errors import ModelError
from model.quant.packing import pack
from model.quant.spec import ROWS, QuantSpec
from model.quant.streams import CODES, matrix_fields
from model.quant.tensor import QuantizedTensor, by_block, by_row, scale_values, zero_values

CPU_SLICE = 1 << 17  # weights: with the solver's temporaries, a few megabytes
GPU_SLICE = 1 << 24  # large enough to keep a GPU busy, small enough for any
LEAST, MOST = 2.0**-100, 2.0**100  # a group whose range is not between these takes the plain zero
NORM = {"lp_norm": 1, "beta": 1e1, "kappa": 1.01, "iters": 20}  # hqq's own, except lp_norm: see `solve`


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
    weight, shape = weight.detach(), (weight.shape[0], weight.shape[1])
    fields = matrix_fields("", shape, spec)
    made = QuantizedTensor.of(
        spec, shape, {f.name[1:]: torch.empty(f.shape, dtype=f.dtype, device=weight.device) for f in fields}
    )

    def work(rows: slice) -> Tensor:  # norms of the difference and of the weights [2]
        part, norms = quantize_rows(weight[rows].float(), spec, name)
        part.copy_to(made.part(rows).streams())
        return norms

    without_gradients = torch.no_grad()(work)  # each thread has to turn them off by itself
    norms = torch.stack(list((pool.map if pool else map)(without_gradients, slices(weight)))).double()
    lost, whole = norms.square().sum(0).sqrt().tolist()  # from [slices, 2]
    return made, lost / whole if whole else 0.0


def slices(weight: Tensor) -> Iterator[slice]:
    """The rows that are solved together, in whole blocks.

    >>> list(slices(torch.empty(80, 4096)))
    [slice(0, 32, None), slice(32, 64, None), slice(64, 80, None)]
    """
    N, K = weight.shape
    rows = max((CPU_SLICE if weight.device.type == "cpu" else GPU_SLICE) // K // ROWS, 1) * ROWS
    return (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def quantize_rows(w: Tensor, spec: QuantSpec, name: str) -> tuple[QuantizedTensor, Tensor]:
    """Quantize `w` [n, K] float32. Returns it, and the norms of the difference and of the weights [2]."""
    n, K = w.shape
    scales, zeros = solve(w, spec, name)  # [n, J] each
    scale_bytes, steps = quantize_scales(by_block(scales), spec)
    streams = {"scales": scale_bytes, "zeros": by_block(zeros), "steps": steps}
    scale = by_row(scale_values(scale_bytes, steps, spec))[..., None]  # [n, J, 1]
    zero = zero_values(zeros, spec)[..., None]
    groups = w.view(n, -1, spec.group_size)
    codes = nearest(groups, scale, zero, spec)
    planes = pack(codes.to(torch.uint8).view(n, K), spec.bits)
    made = QuantizedTensor.of(spec, (n, K), streams | dict(zip(CODES, planes, strict=False)))
    difference = codes.sub_(zero).mul_(scale).sub_(groups)
    return made, torch.stack([torch.linalg.vector_norm(t) for t in (difference, w)])


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


def quantize_scales(scales: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:  # [B, J, 16] float32
    """Scales as multiples, bytes [B, J, 16], of steps, one for every `meta_group_size` scales of a row.

    A multiple is rounded to the nearest, at 8 bits upwards: there, clipping a group's largest weights would
    cost more than a coarser scale. Only a scale of 0 becomes 0.

    hqq itself cannot do this. Its smallest step is 1/20000, while the scales of 8-bit weights are near
    0.0004.

    >>> scales = torch.tensor([0.51, 0.1001, 0.0001, 0.0, 0.255]).view(1, 5, 1)
    >>> multiples, steps = quantize_scales(scales, QuantSpec(4, 16, meta_group_size=4))
    >>> multiples.flatten(), steps.flatten()
    (tensor([255,  50,   1,   0, 255], dtype=torch.uint8), tensor([0.0020, 0.0010]))
    """
    parts = scales.split(spec.meta_group_size, dim=1)
    steps = torch.stack([part.amax(dim=1) for part in parts], dim=1) / 255  # [B, J / meta_group_size, 16]
    each = scale_values(torch.ones_like(scales, dtype=torch.uint8), steps, spec)
    multiples = torch.where(each > 0, scales / each, 0)
    multiples = multiples.ceil() if spec.bits == 8 else multiples.round()
    return multiples.clamp(min=(scales > 0).float(), max=torch.full_like(scales, 255)).to(torch.uint8), steps


def nearest(w: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """The best code for each weight, as float32. Shapes broadcast. The code is 0 where the scale is 0."""
    return torch.where(scale > 0, w / scale + zero, 0).round_().clamp_(0, 2**spec.bits - 1)
