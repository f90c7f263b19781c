"""`python -m tools.bench decode` on models small enough for a test. What it counts, not how fast it is."""

import json
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_hf
from model.config import ModelConfig
from model.mixtral import Mixtral
from model.quant.backends.blocks import Blocks
from model.quant.expert import BLOB_ALIGNMENT
from model.quant.formats import DEFAULT, PLAIN, Formats
from model.quant.spec import QuantSpec
from model.quant.streams import expert_fields, matrix_fields
from model.shapes import SHAPES
from tools.bench import command as bench
from tools.bench import decode
from tools.bench.random_model import random_model

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab=512, hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, ffn=192, experts=4,
    experts_per_token=2, context=700, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
WORDS = ["decode", "--prompt", "20", "--tokens", "4", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "mixtral-8x7b", SMALL)


def round_up(size: int) -> int:
    return -(-size // BLOB_ALIGNMENT) * BLOB_ALIGNMENT


def bytes_by_hand(config: ModelConfig, formats: Formats, wide: int) -> int:
    """What one token reads of a model kept as files have it."""
    c, dtype = config, {2: torch.bfloat16, 4: torch.float32}[wide]
    qkv, out = (c.heads + 2 * c.kv_heads) * c.head_dim, c.heads * c.head_dim
    layer = sum(
        matrix_fields("", shape, formats.attention, dtype=dtype)[-1].end
        for shape in ((qkv, c.hidden), (c.hidden, out))
    )
    layer += c.experts_per_token * round_up(expert_fields(c, formats.experts, dtype=dtype)[-1].end)
    layer += 2 * c.hidden * wide + c.experts * c.hidden * 4  # norms and gate
    head = matrix_fields("", (c.vocab, c.hidden), formats.head, dtype=dtype)[-1].end
    return c.layers * layer + 2 * c.hidden * wide + head  # a row and the last norm


@pytest.mark.parametrize("text", ["4 2 8", "16 4 3", "3 16 16", "16 16 4", "16 16 16"])
def test_bytes_of_a_token(text: str) -> None:
    formats = Formats(*map(QuantSpec.parse, text.split()))
    model = random_model(SMALL, formats, torch.float32, CPU)
    assert all(module.backend is Blocks for module in model.modules() if hasattr(module, "backend"))
    assert decode.bytes_per_token(model) == bytes_by_hand(SMALL, formats, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_token_of_a_plain_model(dtype: torch.dtype) -> None:
    expected = bytes_by_hand(SMALL, PLAIN, dtype.itemsize)
    assert decode.bytes_per_token(Mixtral(SMALL, dtype)) == expected
    assert decode.bytes_per_token(random_model(SMALL, PLAIN, dtype, CPU)) == expected


def test_a_random_model(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    words = [*WORDS, "--shape", "mixtral-8x7b", "--layers", "1", "--experts", "2", "--threads", "2"]
    assert bench.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["model"] == "mixtral-8x7b, 1 layer, random, attention 4, experts 2, head 8"
    assert (report["threads"], report["device"]) == (2, "cpu")
    assert torch.get_num_threads() == threads
    for what, count in (("prompt", 20), ("decode", 4)):
        assert report[what]["tokens"] == count
        assert 0 < report[what]["tokens_per_s"] <= report[what]["best_tokens_per_s"]
    memory = report["memory"]
    bound = memory["bandwidth_bytes_per_s"] / memory["weight_bytes_per_token"]
    assert memory["bound_tokens_per_s"] == pytest.approx(bound)
    assert memory["decode_share_of_bound"] == pytest.approx(report["decode"]["tokens_per_s"] / bound)
    assert [line.split(":")[0] for line in err.splitlines()] == ["1 of 2", "2 of 2"]
    assert bench.main(words) == 0
    assert "decode_share_of_bound" in capsys.readouterr().out


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Mixtral(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    save_hf(model, tmp_path, torch.bfloat16)
    assert bench.main([*WORDS, str(tmp_path), "--dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"].startswith("HF, 1 file, bfloat16") and report["dtype"] == "float32"
    assert report["memory"]["weight_bytes_per_token"] == decode.bytes_per_token(model)
    assert bench.main([*WORDS, str(tmp_path), "--layers", "2"]) == 2
    assert capsys.readouterr().err == "error: --layers is for a random model; a checkpoint has its own\n"


def test_every_repeat_sees_the_same_tokens_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []  # tokens in the cache, given, and their sum
    forward = Mixtral.forward

    def spy(self: Mixtral, ids: torch.Tensor, cache: object, last: bool) -> torch.Tensor:
        assert last and torch.is_inference_mode_enabled()
        calls.append((cache.length, ids.shape[1], int(ids.sum())))  # type: ignore[attr-defined]
        return forward(self, ids, cache, last)  # type: ignore[arg-type]

    monkeypatch.setattr(Mixtral, "forward", spy)
    words = ["decode", "--shape", "mixtral-8x7b", "--prompt", "600", "--tokens", "3", "--repeats", "2"]
    assert bench.main([*words, "--device", "cpu"]) == 0
    once, again = calls[-10:-5], calls[-5:]
    assert [call[:2] for call in once] == [(0, 512), (512, 88), (600, 1), (601, 1), (602, 1)]
    assert once == again


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "one of the arguments model --shape is required"),
        (["--shape", "mixtral-8x7b", "--layers", "0"], 2, "at least 1"),
        (
            ["--shape", "mixtral-8x7b", "--tokens", "681"],
            2,
            "are 701 tokens, and this model was made for 700",
        ),
        (["--shape", "mixtral-8x7b", "--experts", "5"], 1, "5 bits per weight are not supported"),
        (["--shape", "mixtral-8x7b", "--experts", "4g128"], 1, "192 inputs do not divide into groups of 128"),
        (["--shape", "mixtral-8x7b", "--device", "tpu"], 2, "device is 'tpu', and must be cpu, cuda"),
        (["/nowhere"], 1, "/nowhere"),
    ],
)
def test_what_makes_no_sense(
    words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert bench.main([*WORDS, *words]) == status
    except SystemExit as exit:  # argparse's, after its usage
        assert exit.code == status == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error: " in line]
    assert out == "" and len(lines) == 1 and message in lines[0]


def test_a_model_that_memory_cannot_hold_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.planning.request.free_device_bytes", lambda device: 1000)
    assert bench.main([*WORDS, "--shape", "mixtral-8x7b"]) == 1
    assert "memory on cpu" in capsys.readouterr().err


def test_with_experts_that_miss(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--shape", "mixtral-8x7b", "--slots", "2", "--dtype", "float32"]
    assert bench.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    experts, bound = report["experts"], report["bound"]
    assert report["slots"] == [2, 2, 2] and report["context"] == 700 and not report["resident"]
    assert 0 < experts["misses_per_token"] <= SMALL.layers * 2
    assert experts["missed_bytes_per_token"] == experts["misses_per_token"] * report["expert_bytes"]
    copying = experts["missed_bytes_per_token"] / report["link_bytes_per_s"] * 1e3
    assert bound["copying_ms"] == pytest.approx(copying)
    assert bound["bound_ms"] == max(bound["copying_ms"], bound["computing_ms"])
    share = bound["bound_ms"] * report["decode"]["tokens_per_s"] / 1e3
    assert bound["share_of_bound"] == pytest.approx(share)
    size = bytes_by_hand(SMALL, DEFAULT, 4)
    assert report["memory"]["weight_bytes_per_token"] == size
