"""`Mixtral.decode`: the next token of several texts in one forward. Each has the bits that it has alone."""

import math

import pytest
import torch

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime import Engine, EngineOptions
from runtime.engine import DEMO
from tests.quantized import quantize_folder

SHAPES = (
    (64, 96, 4, 2, 16),
    (256, 128, 8, 4, 32),
    (320, 448, 5, 1, 64),
)  # hidden, ffn, heads, groups, head dim


def random_model(shape: tuple[int, ...], dtype: torch.dtype) -> Mixtral:
    hidden, ffn, heads, groups, width = shape
    config = ModelConfig(
        vocab=97, hidden=hidden, layers=3, heads=heads, kv_heads=groups, head_dim=width, ffn=ffn, experts=8,
        experts_per_token=2, context=64, rope_theta=1e4, norm_eps=1e-5, bos_id=1, eos_ids=(2,),
    )  # fmt: skip
    model = Mixtral(config, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=2 / weight.shape[-1] ** 0.5)
    return model


def begun(model: Mixtral, lengths: list[int], dtype: torch.dtype) -> list[KVCache]:
    """KV caches of texts of these lengths."""
    kvs = []
    for n in lengths:
        kv = KVCache.allocate(model.config, 1, 64, dtype, torch.device("cpu"))
        model(torch.randint(97, (1, n)), kv)
        kvs.append(kv)
    return kvs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_text_beside_others_is_what_it_is_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = random_model(shape, dtype)
    lengths = [3, 17, 1, 40, 8, 8, 25, 2, 30]
    kvs, alone = begun(model, lengths, dtype), []
    for kv in kvs:
        other = KVCache.allocate(model.config, 1, 64, dtype, torch.device("cpu"))
        for mine, theirs in zip(other.layers, kv.layers, strict=True):
            mine.k.copy_(theirs.k), mine.v.copy_(theirs.v)
        other.length = kv.length
        alone.append(other)
    for step in range(6):
        count = (9, 2, 5, 1, 8, 3)[step]
        tokens = torch.randint(97, (count,))
        together = model.decode(tokens, kvs[:count])
        for n in range(count):
            expected = model(tokens[n].view(1, 1), alone[n], last=True)[0, 0]
            assert torch.equal(together[n], expected), (step, n, (together[n] - expected).abs().max())
            assert kvs[n].length == alone[n].length
    for kv, other in zip(kvs, alone, strict=True):
        for mine, theirs in zip(kv.layers, other.layers, strict=True):
            assert torch.equal(mine.k, theirs.k) and torch.equal(mine.v, theirs.v)


@torch.inference_mode()
def test_a_text_that_is_not_finite_spoils_no_other() -> None:
    model = random_model(SHAPES[0], torch.float32)
    kvs = begun(model, [4, 5, 6], torch.float32)
    kvs[1].layers[1].k[0, 0, 2] = math.inf
    rows = model.decode(torch.tensor([1, 2, 3]), kvs)
    assert [bool(row.isfinite().all()) for row in rows] == [True, False, True]


@torch.inference_mode()
def test_a_full_text_is_refused_before_anything_is_computed() -> None:
    model = random_model(SHAPES[0], torch.float32)
    kvs = begun(model, [4, 64], torch.float32)
    with pytest.raises(ValueError, match="64 tokens and 1 more"):
        model.decode(torch.tensor([1, 2]), kvs)
    assert [kv.length for kv in kvs] == [4, 64]


@pytest.mark.parametrize("options", [{}, {"slots": 3}, {"slots": 2, "berths": 40}])
@pytest.mark.parametrize("experts", ["4", "3g128", "8"])
def test_quantized_and_offloaded(tmp_path_factory, experts: str, options: dict[str, int]) -> None:  # type: ignore[no-untyped-def]
    """With every kind of matrix a CPU has, and experts resident, in berths, and in files."""
    folder = tmp_path_factory.getbasetemp() / f"decode-{experts}"
    if not folder.exists():
        quantize_folder(DEMO, folder, experts)
    with Engine.load(folder, EngineOptions(device="cpu", dtype="bfloat16", context=64, **options)) as engine:
        runner, texts = engine.runner, [list(range(5, 5 + n)) for n in (3, 9, 30, 14)]
        with runner.working():
            kvs, alone = ([runner.new_kv() for _ in texts] for _ in range(2))
            for ids, *pair in zip(texts, kvs, alone, strict=True):
                for kv in pair:
                    runner.forward(ids, kv)
            for step in range(5):
                tokens = [(7 * step + 31 * n) % engine.config.vocab for n in range(4)]
                together = runner.decode(tokens, kvs)
                for n in range(4):
                    assert torch.equal(together[n], runner.forward([tokens[n]], alone[n])), (step, n)


@pytest.mark.parametrize("options", [{}, {"slots": 3}, {"kv": 8}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_text_has_the_same_bits_however_it_is_cut(
    tmp_path_factory, dtype: str, options: dict[str, int]
) -> None:  # type: ignore[no-untyped-def]
    """Where a CPU's kernels compute all that is quantized: whole, in pieces of any size, and token by token.
    So it makes no difference whether a prompt's beginning was computed for another request."""
    folder = tmp_path_factory.getbasetemp() / "decode-4"
    if not folder.exists():
        quantize_folder(DEMO, folder, "4")
    with Engine.load(folder, EngineOptions(device="cpu", dtype=dtype, context=256, **options)) as engine:
        runner = engine.runner
        ids = [(n * n * 7 + 3 * n) % 1900 + 100 for n in range(200)]
        with runner.working():
            cuts = [[200], [1, 199], [64, 64, 64, 8], [199, 1], [7, 100, 93], [150] + [1] * 50]
            kvs, rows = [], []
            for cut in cuts:
                kv, start = runner.new_kv(), 0
                for length in cut:
                    row = runner.forward(ids[start : start + length], kv)
                    start += length
                kvs.append(kv), rows.append(row)
            for kv, row, cut in zip(kvs[1:], rows[1:], cuts[1:], strict=True):
                for mine, first in zip(kv.parts(200).items(), kvs[0].parts(200).items(), strict=True):
                    assert torch.equal(mine[1], first[1]), (cut, mine[0])
                assert torch.equal(row, rows[0]), cut
