"""Products of a CPU with quantized matrices, against NumPy's and against the dequantized matrix."""

import copy
import hashlib
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from model.kernels.cpu import launching, products
from model.quant.spec import QuantSpec
from model.quant.tensor import QuantizedTensor
from tests.model.kernels.cpu.rounded_reference import multiply, random_matrix

numba = pytest.importorskip("numba")

from model.kernels.cpu import compiling  # noqa: E402  # it imports numba
from model.kernels.cpu.dots import Way  # noqa: E402

SPECS = [
    QuantSpec(bits, group, meta)
    for bits, group, meta in (
        (8, 64, 256), (8, 16, 2), (8, 256, 1), (4, 64, 256), (4, 16, 4), (4, 32, 1), (4, 128, 2),
        (3, 64, 128),
        (3, 16, 128), (3, 32, 1), (3, 512, 128), (2, 16, 128), (2, 32, 4), (2, 64, 128), (2, 256, 1),
    )
]  # fmt: skip
ROWS = (1, 2, 3, 5, 8, 15, 33)


def packed(matrix: QuantizedTensor) -> products.PackedMatrix:
    return products.PackedMatrix(matrix.spec, matrix.shape, matrix.streams())


def activations(rows: int, inputs: int, seed: int = 1) -> Tensor:
    """Some of them much larger than the others, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.01, 20 * x, x)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(16, 512), (48, 1536)])
def test_products_are_those_of_the_reference(spec: QuantSpec, shape: tuple[int, int]) -> None:
    matrix = random_matrix(spec, shape)
    for rows in ROWS:
        x = activations(rows, shape[1])
        y, want = products.multiply(x, packed(matrix)), multiply(x, matrix)
        assert y.shape == want.shape and y.dtype == torch.float32
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("spec", [QuantSpec(bits, 32) for bits in (8, 4, 3, 2)], ids=str)
def test_the_smallest_matrix(spec: QuantSpec) -> None:
    matrix, x = random_matrix(spec, (16, 32)), activations(3, 32)
    torch.testing.assert_close(
        products.multiply(x, packed(matrix)), multiply(x, matrix), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("spec", [QuantSpec(bits, 4096, 4096) for bits in (8, 4, 3, 2)], ids=str)
def test_the_longest_group(spec: QuantSpec) -> None:
    matrix, x = random_matrix(spec, (16, 8192)), activations(2, 8192)
    torch.testing.assert_close(
        products.multiply(x, packed(matrix)), multiply(x, matrix), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("bits", "limit"), [(8, 2e-4), (4, 0.01), (3, 0.01), (2, 0.01)])
def test_rounding_activations_loses_little(bits: int, limit: float) -> None:
    """Measured: 0.0001 at 8 bits, 0.005 to 0.007 at fewer."""
    for group in (16, 64, 128):
        matrix, x = random_matrix(QuantSpec(bits, group), (64, 1024)), torch.randn(4, 1024)
        want = x.double() @ matrix.dequantize().double().T
        error = (products.multiply(x, packed(matrix)) - want).norm() / want.norm()
        assert error < limit, (bits, group, float(error))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_row_does_not_depend_on_the_others(spec: QuantSpec) -> None:
    matrix, x = random_matrix(spec, (48, 1024)), activations(39, 1024)
    alone = torch.cat([products.multiply(row, packed(matrix)) for row in x.split(1)])
    inner = torch.cat(
        [products.gate_up(row, packed(gated := random_matrix(spec, (96, 1024)))) for row in x.split(1)]
    )
    for rows in (2, 3, 4, 7, 8, 13, 39):
        assert torch.equal(
            torch.cat([products.multiply(part, packed(matrix)) for part in x.split(rows)]), alone
        )
        assert torch.equal(
            torch.cat([products.gate_up(part, packed(gated)) for part in x.split(rows)]), inner
        )


@pytest.fixture
def always_parallel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    own = torch.get_num_threads()
    monkeypatch.setattr(launching, "SMALL", 0)
    yield
    torch.set_num_threads(own)


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(3, 128)], ids=str)
def test_threads_do_not_change_a_bit(spec: QuantSpec, always_parallel: None) -> None:
    matrix, x = packed(random_matrix(spec, (16 * 14, 512))), activations(11, 512)
    torch.set_num_threads(1)
    alone = products.multiply(x, matrix), products.gate_up(x, matrix)
    mine = numba.get_num_threads()
    for threads in (2, 3, 64):  # numba has no more than there are processors
        torch.set_num_threads(threads)
        assert torch.equal(products.multiply(x, matrix), alone[0])
        assert torch.equal(products.gate_up(x, matrix), alone[1])
    assert numba.get_num_threads() == mine, "the program's own number is as before"


def test_inner_values() -> None:
    """silu is as exact as float32 permits, far from 0 too."""
    spec, F, D = QuantSpec(4), 48, 256
    matrix = random_matrix(spec, (2 * F, D))
    x = torch.cat([activations(5, D), 1e3 * activations(2, D), 1e-6 * activations(2, D), torch.zeros(1, D)])
    gate, up = products.multiply(x, packed(matrix)).chunk(2, dim=1)
    h = products.gate_up(x, packed(matrix))
    want = silu(gate.double()) * up.double()
    assert bool(torch.isfinite(h).all()) and bool((h[-1] == 0).all())
    torch.testing.assert_close(h.double(), want, rtol=1e-6, atol=1e-30)
    for size in (1e6, 1e20, 3e34):
        x = size * activations(5, D)
        closed = products.multiply(x, packed(matrix)).chunk(2, dim=1)[0] < -200
        assert bool(closed.any()) and bool((products.gate_up(x, packed(matrix))[closed] == 0).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_any_tensor_will_do(bits: int) -> None:
    """Whatever its dtype, strides and history, and also no rows at all."""
    spec, D = QuantSpec(bits), 256
    matrix, x = packed(random_matrix(spec, (32, D))), activations(6, D).half().float()
    want = products.multiply(x, matrix)
    wide = torch.zeros(6, 2 * D)
    wide[:, ::2] = x
    with torch.inference_mode():
        inference = x.clone()
    for same in (
        x.half(),
        x.double(),
        x.T.contiguous().T,
        wide[:, ::2],
        inference,
        x.clone().requires_grad_(),
    ):
        assert torch.equal(products.multiply(same, matrix), want)
    assert torch.equal(products.multiply(x[:1].expand(6, -1), matrix), want[:1].expand(6, -1))
    assert products.multiply(x[:0], matrix).shape == (0, 32)
    assert products.gate_up(x[:0], matrix).shape == (0, 16)
    with pytest.raises(ValueError, match="x has 192 columns, and the matrix 256"):
        products.multiply(x[:, :192], matrix)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_from_its_own_memory(duplicate: Callable[[object], products.PackedMatrix]) -> None:
    matrix, x = packed(random_matrix(QuantSpec(4), (16, 64))), activations(1, 64)
    before = products.multiply(x, matrix)
    other = duplicate(matrix)
    assert torch.equal(products.multiply(x, other), before)
    other.streams["scales"].zero_()
    assert bool((products.multiply(x, other) == 0).all()) and torch.equal(
        products.multiply(x, matrix), before
    )


def test_threads_of_the_program_compute_at_the_same_time(always_parallel: None) -> None:
    matrix, x = packed(random_matrix(QuantSpec(4), (16 * 9, 512))), activations(3, 512)
    want = products.multiply(x, matrix)

    def work(threads: int) -> bool:
        torch.set_num_threads(threads)
        return all(torch.equal(products.multiply(x, matrix), want) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (1, 2, 2, 3)))


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(3, 128), QuantSpec(2), QuantSpec(8)], ids=str)
def test_experts_of_a_token_are_computed_as_alone(spec: QuantSpec) -> None:
    D, F, count = 256, 384, 3
    w13 = [packed(random_matrix(spec, (2 * F, D), seed)) for seed in range(count)]
    w2 = [packed(random_matrix(spec, (D, F), 9 + seed)) for seed in range(count)]
    x = activations(1, D)
    together = products.experts_of_a_token(x, w13, w2)
    for y, a, b in zip(together, w13, w2, strict=True):
        assert torch.equal(y[None], products.multiply(products.gate_up(x, a), b))


@pytest.mark.parametrize("bits", [8, 4])
def test_values_that_are_not_finite_are_not_hidden(bits: int) -> None:
    matrix = packed(random_matrix(QuantSpec(bits), (16, 256)))
    x = activations(6, 256)
    clean = products.multiply(x, matrix)
    for row, value in ((1, torch.nan), (3, torch.inf), (4, -torch.inf)):
        x[row, 77] = value
    y = products.multiply(x, matrix)
    assert bool(y[[1, 3, 4]].isnan().all())
    assert torch.equal(y[[0, 2, 5]], clean[[0, 2, 5]]), "other rows are as before"


def test_values_at_the_ends_of_float32() -> None:
    matrix = packed(random_matrix(QuantSpec(4), (16, 128)))
    x = activations(1, 128)
    x /= x.abs().max()
    for scale in (1e-25, 1e-10, 1e30):
        want = scale * products.multiply(x, matrix)
        torch.testing.assert_close(products.multiply(scale * x, matrix), want, rtol=1e-4, atol=0)
    assert bool((products.multiply(1e-40 * x, matrix) == 0).all()), "a denormal unit becomes 0, not NaN"


def test_an_address_that_is_not_aligned() -> None:
    """Blobs begin at multiples of 16 bytes in a file."""
    matrix, x = random_matrix(QuantSpec(3), (48, 256)), activations(3, 256)
    moved = {}
    for name, stream in matrix.streams().items():
        memory = torch.empty(stream.numel() * stream.element_size() + 64, dtype=torch.uint8)
        start = -memory.data_ptr() % 64 + 16
        part = memory[start : start + stream.numel() * stream.element_size()]
        moved[name] = part.view(stream.dtype).view(stream.shape).copy_(stream)
    y = products.multiply(x, products.PackedMatrix(matrix.spec, matrix.shape, moved))
    assert torch.equal(y, products.multiply(x, packed(matrix)))


WAYS = [way for way in Way if way == Way.GENERIC or way >= compiling.processor()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4), QuantSpec(3), QuantSpec(2)], ids=str)
def test_every_way_gives_the_same_bits(way: Way, spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = random_matrix(spec, (96, 512)), activations(11, 512)
    here, kernel = products.multiply(x, packed(matrix)), compiling.kernel
    monkeypatch.setattr(compiling, "kernel", lambda name, scheme: kernel(name, scheme, way))
    assert torch.equal(products.multiply(x, packed(matrix)), here)


@pytest.mark.parametrize("extreme", [127, -127, 1])
def test_sums_do_not_saturate(extreme: int) -> None:
    """All codes and activations as large as they can be: AVX2's sums of 16 bits are near their end."""
    for bits, way in itertools.product((8, 4, 3, 2), WAYS):
        spec = QuantSpec(bits, 64)
        matrix = random_matrix(spec, (16, 64))
        for name, stream in matrix.streams().items():
            if name.startswith("codes"):
                stream.fill_(255)
        x = torch.full((1, 64), float(extreme))
        want = multiply(x, matrix)
        with pytest.MonkeyPatch.context() as patch:
            kernel = compiling.kernel
            patch.setattr(compiling, "kernel", lambda name, scheme: kernel(name, scheme, way))  # noqa: B023
            torch.testing.assert_close(products.multiply(x, packed(matrix)), want, rtol=1e-6, atol=0)


def some_bits() -> tuple[str, str]:
    """The processor's way, and a digest of some products."""
    x, bits = torch.randn(11, 256, generator=torch.Generator().manual_seed(0)), []
    for product, spec in ((products.multiply, QuantSpec(8)), (products.gate_up, QuantSpec(3, 16))):
        bits.append(product(x, packed(random_matrix(spec, (32, 256)))))
    digest = hashlib.sha256(torch.cat([b.flatten() for b in bits]).numpy().tobytes())
    return compiling.processor().name, digest.hexdigest()


def some_bits_with(**environment: str) -> tuple[str, ...]:
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import some_bits; print(*some_bits())"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.split())


@pytest.mark.skipif(compiling.processor() == Way.GENERIC, reason="there are no features to mask")
def test_processors_with_fewer_features_compute_the_same_bits() -> None:
    """LLVM is told of fewer features than there are, and then has to do without them everywhere."""
    here = some_bits()
    features = "+avx,+avx2,+fma,+sse4.2,+bmi,+bmi2"
    older = some_bits_with(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features)
    oldest = some_bits_with(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert (here[0], older[0], oldest[0]) == (compiling.processor().name, "AVX2", "GENERIC")
    assert here[1] == older[1] == oldest[1]


def test_a_grid_calls_each_program_once(always_parallel: None) -> None:
    """Every block of rows is written by its own program, for every number of programs and threads."""
    for blocks, threads in itertools.product((1, 2, 31, 32, 33, 200), (1, 2)):
        torch.set_num_threads(threads)
        matrix, x = random_matrix(QuantSpec(4), (16 * blocks, 64)), activations(1, 64)
        y = products.multiply(x, packed(matrix))
        torch.testing.assert_close(y, multiply(x, matrix), rtol=1e-5, atol=1e-5)
