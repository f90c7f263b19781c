"""Layouts and sizes: to the byte what real tensors take, and for Mixtral-8x7B no more than the paper's."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.errors import ModelError
from model.mixtral import Mixtral
from model.parameters import EXPERT
from model.quant.formats import DEFAULT, PLAIN, Formats
from model.quant.size import expert_bits, model_size
from model.quant.solve import quantize
from model.quant.spec import QuantSpec
from model.quant.streams import STREAM_ALIGNMENT, Field, expert_fields, matrix_fields, model_fields
from model.quant.tensor import QuantizedTensor
from tests.model.quant.test_spec import SPECS
from tests.model.reference import TINY

ROOT = Path(__file__).resolve().parents[3]
GIB = 1 << 30
MIXTRAL_8X7B = ModelConfig(
    vocab=32000, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, experts=8,
    experts_per_token=2, context=32768, rope_theta=1e6, norm_eps=1e-5,
)  # fmt: skip
SMALL = replace(TINY, vocab=50, hidden=128, head_dim=16, ffn=192)
FORMATS = ("16", "8", "4", "3", "2", "3g128", "2g32")

TABLE_1 = {  # arXiv 2312.17238: (attention, experts): GiB
    (16, 16): 86.99, (16, 4): 25.82, (16, 3): 23.21, (16, 2): 19.33,
    (4, 16): 85.16, (4, 4): 23.99, (4, 3): 21.37, (4, 2): 17.54,
    (3, 4): 23.92, (3, 3): 21.31, (3, 2): 17.46,
    (2, 4): 23.79, (2, 3): 21.18, (2, 2): 17.30,
}  # fmt: skip


def check_contiguous(fields: Sequence[Field]) -> None:
    end = 0
    for field in fields:
        assert field.offset == end
        end = field.end
    assert len({field.name for field in fields}) == len(fields)


@given(SPECS, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_streams_follow_one_another_aligned(spec: QuantSpec, rows: int, groups: int, start: int) -> None:
    shape = (16 * rows, groups * max(spec.group_size, 32))
    first, *_ = fields = matrix_fields("w", shape, spec, STREAM_ALIGNMENT * start)
    assert first.offset == STREAM_ALIGNMENT * start
    assert all(field.offset % STREAM_ALIGNMENT == 0 for field in fields)
    check_contiguous([replace(field, offset=field.offset - first.offset) for field in fields])
    total = fields[-1].end - first.offset
    assert total == pytest.approx(shape[0] * shape[1] * spec.bits_per_weight(shape[1]) / 8, rel=1e-12)


@pytest.mark.parametrize("text", FORMATS[1:])
def test_the_layout_is_that_of_real_tensors(text: str) -> None:
    """A blob made of an expert's streams is read back, as views, by the fields alone."""
    spec = QuantSpec.parse(text)
    config = replace(SMALL, head_dim=32, ffn=256)
    shapes = {"w13": (512, 128), "w2": (128, 256)}
    tensors = {name: quantize(torch.randn(shape), spec)[0] for name, shape in shapes.items()}
    named = {f"{name}.{key}": t for name, made in tensors.items() for key, t in made.streams().items()}
    fields = expert_fields(config, spec)
    assert [(f.name, f.dtype, f.shape) for f in fields] == [
        (k, t.dtype, tuple(t.shape)) for k, t in named.items()
    ]
    blob = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in named.values()])
    assert blob.numel() == fields[-1].end == model_size(config, Formats(experts=spec)).expert
    for name, made in tensors.items():
        views = {
            f.name.removeprefix(f"{name}."): f.view(blob) for f in fields if f.name.startswith(name + ".")
        }
        assert torch.equal(QuantizedTensor.of(spec, shapes[name], views).dequantize(), made.dequantize())


@given(st.tuples(*[st.sampled_from(FORMATS).map(QuantSpec.parse)] * 3))
@settings(deadline=None)
def test_a_size_is_the_sum_of_its_tensors(specs: tuple[QuantSpec, QuantSpec, QuantSpec]) -> None:
    config = replace(SMALL, vocab=48, head_dim=32, ffn=256)
    fields = list(model_fields(config, Formats(*specs)))
    check_contiguous(fields)
    size = model_size(config, Formats(*specs))
    assert size.total == fields[-1].end == sum(field.bytes for field in fields)

    def part(*words: str) -> int:
        return sum(field.bytes for field in fields if any(word in field.name for word in words))

    assert size.embeddings == part("embed_tokens")
    assert size.head == part("lm_head")
    assert size.norms == part("norm.weight")
    assert size.gates == part(".gate.")
    assert size.attention == part("self_attn")
    assert size.experts == part(".experts.")
    assert size.trunk == size.total - size.experts


def test_at_16_bits_it_is_the_model() -> None:
    model = Mixtral(SMALL, device=torch.device("meta"))
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    fields = list(model_fields(SMALL, PLAIN))
    assert {field.name: field.shape for field in fields} == parameters
    assert fields[-1].end == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("spec", ["16", "4", "3"])
def test_an_expert_is_one_run_of_bytes(spec: str) -> None:
    config = replace(SMALL, ffn=256)
    fields = list(model_fields(config, Formats(experts=QuantSpec.parse(spec))))
    for n, e in itertools.product(range(config.layers), range(config.experts)):
        prefix = f"layers.{n}.block_sparse_moe.experts.{e}."
        mine = [field for field in fields if field.name.startswith(prefix)]
        start = fields.index(mine[0])
        assert fields[start : start + len(mine)] == mine
        assert mine == expert_fields(config, QuantSpec.parse(spec), prefix, mine[0].offset)


@pytest.mark.parametrize("ffn", [8, 24, 40, 56, 144])
def test_w3_begins_with_a_block_or_the_format_is_refused(ffn: int) -> None:
    """The rows of w1 and w3 together may be whole blocks where w1 alone is not."""
    assert 2 * ffn % 16 == 0
    with pytest.raises(ModelError, match=rf"\.w2: {ffn} inputs .*; leave it at 16 bits$"):
        expert_fields(replace(SMALL, ffn=ffn), QuantSpec(4, 16), EXPERT.format(n=0, e=0))


def test_the_tensor_at_fault_is_named() -> None:
    config = replace(SMALL, ffn=96)
    with pytest.raises(
        ModelError, match=r"^layers\.0\.block_sparse_moe\.experts\.0\.w2: 96 inputs do not .* 64; use 4g32"
    ):
        model_size(config, Formats(experts=QuantSpec(4)))
    with pytest.raises(ModelError, match=r"^layers\.0\.block_sparse_moe\.experts\.0\.w2: 96 inputs"):
        list(model_fields(config, Formats(experts=QuantSpec(4))))


def test_mixtral_8x7b_against_the_paper() -> None:
    """No size is above the paper's, and docs/formats.md has them all. `pytest -s` prints the table."""
    documented = (ROOT / "docs" / "formats.md").read_text("utf-8").splitlines()
    for attention, experts in itertools.product((16, 4, 3, 2), repeat=2):
        size = model_size(MIXTRAL_8X7B, Formats(QuantSpec(attention), QuantSpec(experts))).total / GIB
        paper = TABLE_1.get((attention, experts))
        row = f"| {attention} | {experts} | {size:.2f} | "
        row += f"{paper:.2f} | {100 * (size / paper - 1):+.1f} % |" if paper else "- | |"
        print(row.replace("-0.0", "+0.0"))
        assert paper is None or round(size, 2) <= paper
        assert row.replace("-0.0", "+0.0") in documented


@pytest.mark.parametrize("text", ["8", "4", "4g128", "3", "3g128", "2", "2g32", "2g64"])
def test_mixtral_8x7b_by_format_of_its_experts(text: str) -> None:
    """The rows of docs/formats.md: bits per weight, an expert's bytes, the model's in the other defaults."""
    spec = QuantSpec.parse(text)
    size = model_size(MIXTRAL_8X7B, replace(DEFAULT, experts=spec))
    bits = expert_bits(MIXTRAL_8X7B, spec)
    row = f"| {spec.bits}g{spec.group_size} | {bits:.3f} | {size.expert:,} | "
    row += f"{size.total / GIB:.2f} | "
    print(row)
    assert row in (ROOT / "docs" / "formats.md").read_text("utf-8")


def test_the_documented_tensors_of_an_expert() -> None:
    documented = (ROOT / "docs" / "formats.md").read_text("utf-8").splitlines()
    fields = expert_fields(MIXTRAL_8X7B, QuantSpec(4))
    rows = [f"| `{f.name}` {list(f.shape)} | {f.offset:,} | {f.bytes:,} |" for f in fields]
    rows.append(f"| all | | {fields[-1].end:,} |")
    start = documented.index(rows[0])
    assert documented[start : start + len(rows)] == rows


def test_mixtral_8x7b_at_16_bits_is_the_published_size() -> None:
    assert model_size(MIXTRAL_8X7B, PLAIN).total == 2 * 46_702_792_704
