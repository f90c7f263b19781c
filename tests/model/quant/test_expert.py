"""Experts as runs of bytes, against the module with parameters and against dequantized weights."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.moe import Expert, ResidentExperts, mix
from model.quant.backends import int4pack
from model.quant.backends.blocks import Blocks
from model.quant.backends.int4pack import Int4Pack, kernel_block
from model.quant.backends.lanes import Lanes
from model.quant.expert import BlobExperts, ExpertFormat, views
from model.quant.solve import quantize
from model.quant.spec import QuantSpec
from model.router import Choice
from model.target import Target

CPU = torch.device("cpu")
HERE = Target.of(CPU)
CONFIG = ModelConfig(
    vocab=64, hidden=128, layers=1, heads=4, kv_heads=2, head_dim=32, ffn=192, experts=4, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5)  # fmt: skip
SPECS = [QuantSpec.parse(text) for text in ("8", "4", "3", "2", "2g64", "3g32", "4g16", "8g16")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_stored(form: ExpertFormat, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An expert's bytes as files have them, and its matrices in float64."""
    generator = torch.Generator().manual_seed(seed)
    stored, matrices = torch.empty(form.stored[-1].end, dtype=torch.uint8), {}
    for name, (N, K) in form.shapes.items():
        weight = torch.randn(N, K, generator=generator) / K**0.5
        memory = views(form.stored, name, stored)
        if form.spec.quantized:
            matrix, _ = quantize(weight, form.spec)
            for stream, tensor in matrix.streams().items():
                memory[stream].copy_(tensor)
            matrices[name] = matrix.dequantize().double()
        else:
            memory["weight"].copy_(weight)
            matrices[name] = memory["weight"].double()
    return stored, matrices


def reference(x: Tensor, matrices: dict[str, Tensor]) -> Tensor:
    gate, up = (x.double() @ matrices["w13"].T).chunk(2, dim=1)
    return (gate * torch.sigmoid(gate) * up) @ matrices["w2"].T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_width_against_dequantized_weights(spec: QuantSpec, dtype: torch.dtype) -> None:
    form = ExpertFormat.of(CONFIG, spec, dtype, HERE)
    blob = torch.full((form.blob_bytes,), 0x5A, dtype=torch.uint8)
    expert = form.bind(blob)
    for seed in (1, 2):  # what is bound computes whatever is there at the time
        stored, matrices = make_stored(form, seed)
        form.store(stored, blob)
        for M in (0, 1, 2, 7, 60):
            x = torch.randn(M, CONFIG.hidden).to(dtype)
            y, expected = expert(x), reference(x, matrices)
            assert y.shape == x.shape and y.dtype == dtype
            assert (y.double() - expected).norm() <= (
                2e-6 if dtype == torch.float32 else 0.02
            ) * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_16_bits_it_is_the_module_bit_for_bit(dtype: torch.dtype) -> None:
    form = ExpertFormat.of(CONFIG, QuantSpec(16), dtype, HERE)
    assert form.stored == form.kept and form.remark is None
    stored, _ = make_stored(form, 0)
    blob = torch.empty(form.blob_bytes, dtype=torch.uint8)
    form.store(stored, blob)
    module = Expert(CONFIG, dtype, CPU).requires_grad_(False)
    for name, linear in (("w13", module.w13), ("w2", module.w2)):
        linear.weight.copy_(views(form.stored, name, stored)["weight"])
    for M in (1, 2, 7, 60):
        x = torch.randn(M, CONFIG.hidden).to(dtype)
        assert torch.equal(form.bind(blob)(x), module(x))


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_of_a_blob_computes_the_same_bits(spec: QuantSpec, dtype: torch.dtype) -> None:
    """What offloading relies on: the slot that an expert is in changes nothing."""
    form = ExpertFormat.of(CONFIG, spec, dtype, HERE)
    arena = torch.zeros(2, form.blob_bytes, dtype=torch.uint8)
    slots = torch.full((3, form.blob_bytes), 0xFF, dtype=torch.uint8)
    bound = [form.bind(slot) for slot in slots]
    for i, blob in enumerate(arena):
        form.store(make_stored(form, i)[0], blob)
    for M, i in itertools.product((1, 5, 60), (0, 1)):
        x = torch.randn(M, CONFIG.hidden).to(dtype)
        for slot, expert in zip(slots, bound, strict=True):
            slot.copy_(arena[i])
            assert torch.equal(expert(x), form.bind(arena[i])(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ffn", [192, 224])
@pytest.mark.parametrize("spec", [QuantSpec(16), QuantSpec(2), QuantSpec(3, 16)], ids=str)
def test_blobs_are_aligned_and_hold_all(spec: QuantSpec, ffn: int, dtype: torch.dtype) -> None:
    form = ExpertFormat.of(replace(CONFIG, ffn=ffn), spec, dtype, HERE)
    assert form.blob_bytes % 256 == 0 and 0 <= form.blob_bytes - form.kept[-1].end < 256
    for fields in (form.stored, form.kept):
        assert fields[0].offset == 0 and all(a.end == b.offset for a, b in itertools.pairwise(fields))
        assert all(field.offset % 16 == 0 for field in fields)


def test_each_matrix_has_the_backend_that_suits_it(
    monkeypatch: pytest.MonkeyPatch, without_numba: str
) -> None:
    monkeypatch.setattr(int4pack, "kernel_block", lambda: 64)
    form = ExpertFormat.of(CONFIG, QuantSpec(4), torch.bfloat16, HERE)
    assert form.backends == {"w13": Int4Pack, "w2": Int4Pack} and form.remark == without_numba
    mixed = replace(CONFIG, hidden=96)  # w2 has 96 rows
    form = ExpertFormat.of(mixed, QuantSpec(4, 16), torch.bfloat16, HERE)
    assert form.backends == {"w13": Int4Pack, "w2": Blocks}
    assert ExpertFormat.of(mixed, QuantSpec(4, 16), torch.float32, HERE).remark is None


def test_where_one_matrix_takes_the_slow_way_both_are_right(without_numba: str) -> None:
    config = replace(CONFIG, ffn=224)  # w13 has 448 rows, which is 7 * 64; w2 has groups of 16 in pairs
    for spec in (QuantSpec(4, 32), QuantSpec(2)):
        form = ExpertFormat.of(replace(config, hidden=96), spec, torch.bfloat16, HERE)  # w2: 96 rows
        if kernel_block():
            assert form.backends == {"w13": Int4Pack, "w2": Blocks}
        stored, matrices = make_stored(form, 3)
        blob = torch.empty(form.blob_bytes, dtype=torch.uint8)
        form.store(stored, blob)
        x = torch.randn(7, 96).bfloat16()
        expected = reference(x, matrices)
        assert (form.bind(blob)(x).double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_token_is_computed_as_a_row_among_others(spec: QuantSpec) -> None:
    """A CPU computes a token's experts together. Offloaded ones are computed as they arrive, one by one."""
    form = ExpertFormat.of(CONFIG, spec, torch.bfloat16, HERE)
    layer = BlobExperts.empty(form, CONFIG.experts, CPU)
    for e, blob in enumerate(layer.blobs):
        form.store(make_stored(form, e)[0], blob)
    x = torch.randn(6, CONFIG.hidden).bfloat16()
    choice = Choice(torch.rand(6, CONFIG.experts).argsort(1)[:, :2], torch.rand(6, 2).softmax(1))
    alone = [Choice(choice.ids[i : i + 1], choice.weights[i : i + 1]) for i in range(6)]
    together = form.together(x[:1], layer.experts[:2])
    assert (together is None) == (form.backends["w2"] is not Lanes)
    expected = layer(x, choice)
    for i in range(6):
        assert torch.equal(layer(x[i : i + 1], alone[i]), mix(layer.experts, x[i : i + 1], alone[i]))
        if together is not None:
            assert torch.equal(layer(x[i : i + 1], alone[i]), expected[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [0, 1, 2, 9])
def test_a_layer_of_blobs_mixes_as_one_of_parameters(N: int, dtype: torch.dtype) -> None:
    form = ExpertFormat.of(CONFIG, QuantSpec(16), dtype, HERE)
    layer = BlobExperts.empty(form, CONFIG.experts, CPU)
    resident = ResidentExperts(CONFIG, dtype, CPU).requires_grad_(False)
    for e, (blob, expert) in enumerate(zip(layer.blobs, resident.experts, strict=True)):
        stored, _ = make_stored(form, e)
        form.store(stored, blob)
        expert.w13.weight.copy_(views(form.stored, "w13", stored)["weight"])
        expert.w2.weight.copy_(views(form.stored, "w2", stored)["weight"])
    x = torch.randn(N, CONFIG.hidden).to(dtype)
    ids = torch.rand(N, CONFIG.experts).argsort(1)[:, :2]
    weights = torch.rand(N, 2).softmax(1)
    assert torch.equal(layer(x, Choice(ids, weights)), resident(x, Choice(ids, weights)))


@pytest.mark.parametrize("N", [1, 6])
def test_contributions_are_added_by_ascending_expert(N: int) -> None:
    """In bfloat16 1 + 2^-8 + 2^-8 is 1 from the left, and 1 + 2^-7 from the right."""
    outputs = [torch.tensor(value).bfloat16() for value in (1.0, 2**-8, 2**-8)]
    experts = [lambda x, y=y: y.expand(x.shape) for y in outputs]
    x, weights = torch.zeros(N, 2).bfloat16(), torch.ones(N, 3)
    for order in itertools.permutations(range(3)):
        ids = torch.tensor([order] * N)
        assert mix(experts, x, Choice(ids, weights)).tolist() == [[1.0, 1.0]] * N
        assert mix(experts[::-1], x, Choice(ids, weights)).tolist() == [[1 + 2**-7] * 2] * N
