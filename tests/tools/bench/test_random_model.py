"""Models of random weights: nothing is left unfilled, and activations are of ordinary size."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.linear import Linear, PackedLinear
from model.mixtral import Mixtral
from model.quant.expert import BLOB_ALIGNMENT, BlobExperts
from model.quant.formats import Formats
from model.quant.product import QuantizedLinear
from model.quant.spec import QuantSpec
from model.shapes import SHAPES
from runtime.planning.costs import count_weights
from tools.bench.random_model import fill_normal, random_matrix, random_model

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab=512, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=192, experts=4,
    experts_per_token=2, context=64, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
IDS = torch.arange(40).view(2, 20)


def make(formats: str, dtype: torch.dtype = torch.float32, **options: int) -> Mixtral:
    """The random model with attention, experts and, if it is given, head in these formats."""
    return random_model(SMALL, Formats(*map(QuantSpec.parse, formats.split())), dtype, CPU, **options).eval()


def blobs(model: Mixtral) -> list[torch.Tensor]:
    """Every expert's bytes, less the last few, which only fill up."""
    layers = [block.block_sparse_moe.experts for block in model.layers]
    assert all(isinstance(layer, BlobExperts) for layer in layers)
    return [blob[:-BLOB_ALIGNMENT] for layer in layers for blob in layer.blobs]


@pytest.mark.parametrize("text", ["8", "4", "3", "2", "4g128", "2g64", "3g16"])
@pytest.mark.parametrize("K", [128, 1024])
def test_weights_have_the_usual_deviation(text: str, K: int) -> None:
    matrix = random_matrix(QuantSpec.parse(text), (512, K), torch.Generator().manual_seed(0))
    weights = matrix.dequantize() * K**0.5
    assert weights.std() == pytest.approx(1, abs=0.02)
    assert weights.mean() == pytest.approx(0, abs=0.02)
    assert len(matrix.unpack().unique()) == 2**matrix.spec.bits
    assert weights.corrcoef().fill_diagonal_(0).abs().max() < 6 / K**0.5  # no row is like another


def test_ordinary_weights_too() -> None:
    weight = torch.full((600, 300), torch.nan)
    fill_normal(weight, torch.Generator().manual_seed(0))
    assert weight.std() * 300**0.5 == pytest.approx(1, abs=0.02)
    assert len(weight.unique(dim=0)) > 590


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formats", ["4 2 8", "16 4 4", "3 16", "16 16", "8 3g64 16", "16 16 3"])
def test_everything_is_filled(formats: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized memory is NaN here: four bytes of 0xFF in float32, two in bfloat16."""
    empty = torch.empty

    def spoilt(*args: object, **options: object) -> torch.Tensor:
        tensor = empty(*args, **options)  # type: ignore[call-overload]
        tensor.flatten().view(torch.uint8).fill_(0xFF)
        return tensor

    monkeypatch.setattr(torch, "empty", spoilt)
    model = make(formats, dtype)
    monkeypatch.undo()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with torch.inference_mode():
        logits = model(IDS)
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2  # the norm's ones by weights of 1 / sqrt(D)
    attention, _, head = [*formats.split(), "16"][:3]
    for spec, module in ((attention, model.layers[0].self_attn.qkv_proj), (head, model.lm_head)):
        assert isinstance(module, QuantizedLinear if spec != "16" else (Linear, PackedLinear))
    assert len({bytes(blob.numpy().tobytes()) for blob in blobs(model)}) == SMALL.layers * SMALL.experts


def test_every_model_is_the_same() -> None:
    with torch.inference_mode():
        assert torch.equal(make("4 2")(IDS), make("4 2")(IDS))


@pytest.mark.parametrize("distinct", [1, 3])
def test_experts_may_be_copies(distinct: int) -> None:
    copies, whole = blobs(make("4 2", distinct=distinct)), blobs(make("4 2"))
    assert len(copies) == 8
    for e, blob in enumerate(copies):
        assert torch.equal(blob, copies[e % distinct])
        assert blob.data_ptr() not in {other.data_ptr() for other in copies[:e]}
    assert len({blob.numpy().tobytes() for blob in copies}) == distinct
    assert torch.equal(copies[0], whole[0])


def test_a_format_that_does_not_fit() -> None:
    with pytest.raises(ModelError, match="192 inputs do not divide into groups of 128"):
        random_model(SMALL, Formats(experts=QuantSpec(4, 128)), torch.float32, CPU)
    with pytest.raises(ModelError, match="96 inputs do not divide"):
        random_model(replace(SMALL, hidden=96), Formats(QuantSpec(4), QuantSpec(4, 32)), torch.float32, CPU)


def test_a_slow_product_is_warned_of(without_numba: str) -> None:
    with pytest.warns(RuntimeWarning, match="attention in format 4 and experts in format 2: computed slowly"):
        make("4 2", torch.float16)
    with pytest.warns(RuntimeWarning, match="^head in format 8: computed slowly"):
        make("16 16 8", torch.float16)


@pytest.mark.parametrize(
    ("shape", "billions", "of_experts"),
    [("mixtral-8x7b", 46.7, 45.1), ("mixtral-8x22b", 140.6, 135.3), ("quarter", 1.5, 1.4)],
)
def test_shapes_have_the_published_numbers_of_weights(shape: str, billions: float, of_experts: float) -> None:
    trunk, experts = count_weights(SHAPES[shape])
    assert (round((trunk + experts) / 1e9, 1), round(experts / 1e9, 1)) == (billions, of_experts)
