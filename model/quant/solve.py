"""HQQ (mobiusml.github.io/hqq_blog): a matrix of floats into the nearest the format has.

The hqq package's solver chooses each group's scale and zero. It is fed a few rows at a time: it goes over its
temporaries some twenty times, which costs several times less while they stay in the cache, and it solves for
each group by itself, except that it stops when the mean error over all that it was given no longer falls.
Its scales and zeros are then rounded to what the format can store, and every weight takes the code that is
nearest under these, so that their rounding costs next to nothing.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from model.errors import ModelError
from model.quant.layout import CODES, STEPS
from model.quant.packing import PLANES, pack
from model.quant.spec import QuantSpec
from model.quant.tensor import QuantisedTensor, scale_values, zero_values

CPU_SLICE = 1 << 17  # weights: with the solver's temporaries, a few megabytes
GPU_SLICE = 1 << 24  # large enough to keep one busy, small enough for any
FLAT = 1e-4  # a group with a narrower range is given up by hqq
SMALL = 2.0**-6  # hqq caps the inverse of scales at 20000, which hurts matrices of a smaller root mean square


@torch.no_grad()
def quantise(weight: Tensor, spec: QuantSpec, name: str = "matrix") -> tuple[QuantisedTensor, float]:
    """`weight` [N, K] in this format, on its device, and the error of that: |W - W'| / |W|, Frobenius norms.

    The same input gives the same bytes on the same machine. `name` is for messages. Raises `ModelError` if
    the format does not take the shape, or for weights that are not finite.
    """
    assert spec.quantised, spec
    spec.check(name, weight.shape)
    N, K = weight.shape
    J = K // spec.group_size
    scales = torch.empty(N, J, dtype=torch.float32, device=weight.device)
    zeros = torch.empty(N, J, dtype=torch.uint8, device=weight.device)
    for rows in slices(weight):
        w = weight[rows].float()
        if not bool(w.isfinite().all()):
            raise ModelError(f"{name}: has weights that are not finite numbers; the source is damaged")
        scales[rows], zeros[rows] = solve(w, spec)
    scale_bytes, steps = quantise_scales(scales, spec)
    scales = scale_values(scale_bytes, steps, spec)
    zero = zero_values(zeros, spec)
    planes = {
        stream: torch.empty(N, K * width // 8, dtype=torch.uint8, device=weight.device)
        for stream, width in zip(CODES, PLANES[spec.bits], strict=False)
    }
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)  # of the differences, of the weights
    for rows in slices(weight):
        w = weight[rows].float().view(-1, J, spec.group_size)
        codes = nearest(w, scales[rows, :, None], zero[rows, :, None], spec)
        difference = (codes - zero[rows, :, None]) * scales[rows, :, None] - w
        squares += torch.stack([t.square().sum(dtype=torch.float64) for t in (difference, w)])
        packed = pack(codes.to(torch.uint8).view(-1, K), spec.bits, spec.group_size)
        for plane, part in zip(planes.values(), packed, strict=True):
            plane[rows] = part
    streams = {**planes, "scales": scale_bytes, "zeros": zeros, "steps": steps}
    lost, whole = squares.tolist()
    return QuantisedTensor.of(spec, (N, K), streams), math.sqrt(lost / whole) if whole else 0.0


def slices(weight: Tensor) -> Iterator[slice]:
    """Rows to be solved together.

    >>> list(slices(torch.empty(80, 4096)))
    [slice(0, 32, None), slice(32, 64, None), slice(64, 80, None)]
    """
    N, K = weight.shape
    step = max((CPU_SLICE if weight.device.type == "cpu" else GPU_SLICE) // K, 1)
    return (slice(start, min(start + step, N)) for start in range(0, N, step))


def solve(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:  # w [n, K] float32
    """Each group's scale [n, J] float32, and its zero as the format stores it [n, J] uint8."""
    from hqq.core.quantize import Quantizer  # slow to import, and wanted by nobody who only runs a model

    lift = power_of_two(w)
    groups = (w * lift).view(-1, spec.group_size)
    _, meta = Quantizer.quantize(
        groups,
        nbits=spec.bits,
        group_size=spec.group_size,
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device=str(w.device),
    )
    scale, zero = meta["scale"].float(), meta["zero"].float()  # [groups, 1]
    top, units = 2**spec.bits - 1, 2 ** (8 - spec.bits)
    low, high = groups.aminmax(dim=1, keepdim=True)

    # A group on one side of 0 has its zero outside of the codes, and a nearly constant one got no scale of
    # its own: both take the plain scale from lowest to highest, 0 included.
    plain = (high.clamp(min=0) - low.clamp(max=0)) / top
    plain_zero = torch.where(plain > 0, -low.clamp(max=0) / plain, 0)
    odd = (low > 0) | (high < 0) | (high - low <= FLAT)
    scale, zero = torch.where(odd, plain, scale), torch.where(odd, plain_zero, zero)
    zero_bytes = (zero * units).round().clamp(0, 255).to(torch.uint8)
    return (scale / lift).view(w.shape[0], -1), zero_bytes.view(w.shape[0], -1)


def power_of_two(w: Tensor) -> float:
    """What to multiply small weights by, so that hqq's absolute thresholds do not touch them; exact to undo.

    >>> power_of_two(torch.full((2, 2), 0.02)), power_of_two(torch.full((2, 2), 0.003)), power_of_two(torch.zeros(2, 2))
    (1.0, 8.0, 1.0)
    """  # noqa: E501
    size = w.double().square().mean().sqrt().item()
    return 2.0 ** min(math.ceil(math.log2(SMALL / size)), 100) if 0 < size < SMALL else 1.0


def quantise_scales(scales: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:  # [N, J] float32
    """Scales as multiples of a step for each `meta_group_size` of them: bytes [N, J], and the steps.

    They are rounded to the nearest, but at 8 bits upwards: there, clipping a group's largest weights would
    cost more than a coarser scale. Only a scale of 0 becomes 0.

    hqq itself cannot do this: its least step is 1/20000, while the scales of 8-bit weights are near 0.0004.

    >>> quantise_scales(torch.tensor([[0.51, 0.1001, 0.0001, 0.0]]), QuantSpec(4, 16, 16))
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
    """The best code for each weight, as float32; shapes broadcast. Where the scale is 0 any code will do."""
    return torch.where(scale > 0, w / scale + zero, 0).round_().clamp_(0, 2**spec.bits - 1)
