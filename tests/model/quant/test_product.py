"""The choice of a backend, and the layer around it."""

import pytest
import torch

from model.kernels import launching
from model.quant.backends import blocks, has_fast_product, int4pack, pick_backend, scratch_bytes
from model.quant.backends.blocks import Blocks
from model.quant.backends.fused import Fused
from model.quant.backends.int4pack import Int4Pack
from model.quant.backends.lanes import Lanes
from model.quant.product import QuantizedLinear
from model.quant.solve import quantize
from model.quant.spec import QuantSpec
from model.target import Target

CPU = torch.device("cpu")
HERE = Target.of(CPU)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("spec", "shape"), [("4", (64, 64)), ("3g16", (48, 96)), ("8", (16, 64)), ("2", (80, 32))]
)
def test_on_a_cpu_numba_takes_every_matrix(spec: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert pick_backend(QuantSpec.parse(spec), shape, dtype, HERE) == (Lanes, None)
    assert scratch_bytes(14336, dtype, HERE) == 0


@pytest.mark.parametrize(
    ("spec", "shape", "dtype", "reason"),
    [
        ("4", (64, 64), BF16, None),
        ("3", (128, 192), BF16, None),
        ("2", (64, 64), BF16, None),
        ("8", (64, 64), BF16, None),
        ("4g512", (64, 512), BF16, None),
        ("4", (64, 64), F16, "computes in bfloat16, not float16; choose the dtype bfloat16"),
        ("4", (96, 64), BF16, "takes rows in multiples of 64 and inputs of 64, not 96 x 64; where memory"),
        ("4", (80, 128), BF16, "takes rows in multiples of 64 and inputs of 64, not 80 x 128; where memory"),
        ("8g16", (64, 64), BF16, "takes 8 bits in groups of 32 or more, not 16; quantize them to 8g32"),
    ],
)
def test_without_numba_the_kernel_of_pytorch_is_chosen_where_it_can_be(
    spec: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    without_numba: str,
) -> None:
    """The remark names numba in any case, which would take all of them."""
    monkeypatch.setattr(int4pack, "kernel_block", lambda: 64)
    backend = Blocks if reason else Int4Pack
    assert pick_backend(QuantSpec.parse(spec), shape, dtype, HERE) == (backend, without_numba)
    said = Int4Pack.unsupported(QuantSpec.parse(spec), shape, dtype, HERE)
    assert said is None if reason is None else said is not None and said.startswith(reason)


def test_a_cpu_without_any_kernel(monkeypatch: pytest.MonkeyPatch, without_numba: str) -> None:
    monkeypatch.setattr(int4pack, "kernel_block", lambda: 0)
    for dtype in (BF16, F16):  # another dtype would not help
        assert pick_backend(QuantSpec(4), (64, 64), dtype, HERE) == (Blocks, without_numba)
        said = Int4Pack.unsupported(QuantSpec(4), (64, 64), dtype, HERE)
        assert said is not None and "AVX2" in said and "16 bits" in said
    layer = QuantizedLinear(64, 64, QuantSpec(4), BF16, CPU)
    assert layer.remark == without_numba and isinstance(layer.product, Blocks)


def test_float32_on_a_cpu_is_nothing_to_remark_on() -> None:
    assert pick_backend(QuantSpec(2), (48, 96), F32, HERE) == (Blocks, None)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_gpu_multiplies_from_packed_bytes_where_it_can(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    old = (
        (Blocks, "8.0 for bfloat16, and this one has 7.5; use --dtype float16")
        if dtype == BF16
        else (Fused, None)
    )
    older = "capability 8.0, and this" if dtype == BF16 else "capability 7.5, and this"
    for capability, (backend, remark) in {
        (8, 0): (Fused, None),
        (7, 5): old,
        (7, 0): (Blocks, older),
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(launching, "uncompiled", lambda device: None)
        chosen, said = pick_backend(QuantSpec(2), (48, 96), dtype, Target.of(torch.device("cuda")))
        assert chosen is backend and (said is None if remark is None else said and remark in said)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen, said = pick_backend(QuantSpec(2), (48, 96), dtype, Target.of(torch.device("cuda")))
    assert chosen is Blocks and said == "needs a CUDA device, and there is none here"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_leading_dimensions(bits: int, dtype: torch.dtype) -> None:
    matrix, _ = quantize(torch.randn(192, 128), QuantSpec(bits))
    layer = QuantizedLinear(128, 192, matrix.spec, dtype, CPU)
    layer.store(matrix)
    assert isinstance(layer.product, Lanes if dtype != F32 else Blocks)
    expected = matrix.dequantize(torch.float64)
    for shape in ((128,), (1, 128), (0, 128), (2, 0, 128), (2, 3, 128), (2, 2, 2, 128)):
        x = torch.randn(shape).to(dtype)
        y = layer(x)
        assert y.shape == (*shape[:-1], 192) and y.dtype == dtype
        error = (y.double() - x.double() @ expected.T).norm()
        assert error <= (1e-6 if dtype == F32 else 0.01) * (x.double() @ expected.T).norm()
    x = torch.randn(3, 2, 128).to(dtype)
    by_row = torch.stack([torch.stack([layer(row) for row in rows]) for rows in x.transpose(0, 1)])
    torch.testing.assert_close(layer(x.transpose(0, 1)), by_row, rtol=2e-2, atol=2e-2)


def test_its_weights_are_not_parameters_and_are_as_small_as_the_format() -> None:
    layer = QuantizedLinear(256, 256, QuantSpec(4), F32, CPU)
    assert not list(layer.parameters()) and not layer.state_dict()
    assert (
        sum(tensor.nbytes for tensor in layer.memory.values())
        == 256 * 256 * QuantSpec(4).bits_per_weight(256) / 8
    )


def test_scratch_is_what_a_product_expands(without_numba: str) -> None:
    assert scratch_bytes(14336, BF16, HERE) == 8 * 512 * 14336
    assert scratch_bytes(14336, F32, HERE) == 8 * blocks.CPU_BLOCK
    assert scratch_bytes(64, BF16, HERE) == 8 * blocks.CPU_BLOCK, "some of a model's matrices may take it"
    gpu, old, older = (Target.hypothetical(capability) for capability in ((8, 0), (7, 5), (7, 0)))
    assert [scratch_bytes(14336, dtype, gpu) for dtype in (BF16, F32)] == [64 << 20, 128 << 20]
    assert scratch_bytes(1 << 22, F16, gpu) == 16 * 2 << 22, "a matrix is expanded by 16 rows at least"
    assert scratch_bytes(14336, F16, old) == 64 << 20
    assert scratch_bytes(14336, BF16, old) == scratch_bytes(14336, F16, older) == 8 * blocks.GPU_BLOCK


def test_a_hypothetical_gpu_is_judged_by_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "untried", lambda device: pytest.fail("it is not there"))
    assert pick_backend(QuantSpec(2), (48, 96), BF16, Target.hypothetical((9, 0))) == (Fused, None)
    assert pick_backend(QuantSpec(2), (48, 96), F16, Target.hypothetical((7, 5))) == (Fused, None)
    backend, said = pick_backend(QuantSpec(2), (48, 96), F16, Target.hypothetical((7, 0)))
    assert backend is Blocks and said is not None and "7.5, and this one has 7.0" in said
    assert has_fast_product(F16, Target.hypothetical())


def test_a_place_to_be_kept_in() -> None:
    matrix, _ = quantize(torch.randn(64, 64), QuantSpec(4))
    alone = QuantizedLinear(64, 64, matrix.spec, F32, CPU)
    memory = torch.zeros(8192, dtype=torch.uint8)
    layer = QuantizedLinear(64, 64, matrix.spec, F32, CPU, memory[256:])
    alone.store(matrix), layer.store(matrix)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), alone(x)) and memory[256:].any() and not memory[:256].any()
