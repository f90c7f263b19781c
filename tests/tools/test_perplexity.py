"""Perplexity: against the definition, against Transformers, and in every chunking."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from model.config import ModelConfig
from model.mixtral import Mixtral
from runtime import Engine, EngineOptions, RequestError
from runtime.engine import DEMO
from tools import perplexity
from tools.perplexity import negative_log_likelihood, read_text
from tools.windows import chunks, windows

CONTEXT = 48
TEXT = "def mean(values):\n    return sum(values) / len(values)  # naïve\n" * 30

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> Mixtral:
    config = ModelConfig(
        vocab=97, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=32, experts=4,
        experts_per_token=2, context=CONTEXT, rope_theta=1e4, norm_eps=1e-5)  # fmt: skip
    model = Mixtral(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=2 / weight.shape[-1] ** 0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(options=EngineOptions(device="cpu", dtype="float32"))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in a folder with a `text`; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(TEXT, "utf-8")

    def run(*words: object) -> tuple[int, str, str]:
        try:
            status = perplexity.main([*map(str, words), "--device", "cpu"])
        except SystemExit as exit:
            status = int(str(exit.code))
        out, err = capsys.readouterr()
        return status, out, err

    return run


def ids_of(count: int) -> list[int]:
    return random.Random(count).choices(range(97), k=count)


def by_definition(model: Mixtral, ids: list[int], window: int, stride: int) -> float:
    """Each id by a forward of its own, on the first window that holds all `stride` steps before it."""
    total = 0.0
    for target in range(1, len(ids)):
        start = max(
            0, -(-(target - window) // stride) * stride
        )  # the first window that reaches to target - 1
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:target]]))[0, -1]
        total -= F.log_softmax(logits.double(), -1)[ids[target]].item()
    return total


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_predict_each_id_once_with_all_the_context_there_is(
    tokens: int, window: int, data: Any
) -> None:
    stride = data.draw(st.integers(1, window))
    seen = list(windows(tokens, window, stride))
    assert [i for _, first, end in seen for i in range(first, end)] == list(range(tokens - 1))
    for start, first, end in seen:
        assert start <= first < end <= start + window
        assert start == 0 or first - start >= window - stride


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_chunks_cover_the_range_and_are_about_equal(start: int, length: int, size: int) -> None:
    pieces = list(chunks(start, start + length, size))
    assert [i for a, b in pieces for i in range(a, b)] == list(range(start, start + length))
    sizes = {b - a for a, b in pieces} or {1}
    assert len(pieces) == -(-length // size) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("count", "window", "stride"),
    [
        (130, 48, 24),
        (130, 48, 48),
        (40, 12, 1),
        (97, 32, 32),
        (50, 2, 1),
        (48, 48, 24),
        (9, 48, 7),
        (2, 48, 24),
    ],
)
def test_equals_the_definition_in_every_chunking(
    model: Mixtral, count: int, window: int, stride: int
) -> None:
    ids = ids_of(count)
    expected = by_definition(model, ids, window, stride)
    for chunk in (1, 7, 64, count):
        done: list[int] = []
        nats = negative_log_likelihood(model, ids, window, stride, chunk, done.append)
        assert nats == pytest.approx(expected, rel=1e-5)
        assert sum(done) == count - 1


def test_a_longer_text_than_the_context_needs_a_window(model: Mixtral) -> None:
    with pytest.raises(ValueError, match="do not fit a context of 48"):
        negative_log_likelihood(model, ids_of(60), 60, 30)
    with pytest.raises(ValueError, match="a stride of 9 for a window of 8"):
        negative_log_likelihood(model, ids_of(60), 8, 9)


def test_memory_of_logits_is_bounded_by_the_chunk(model: Mixtral) -> None:
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(logits.shape[1]))
    try:
        negative_log_likelihood(model, ids_of(130), 48, 24, chunk=10)
    finally:
        hook.remove()
    assert max(shapes) == 10
    assert sum(shapes) < 129 + 30  # what is only in view costs no head, but for one row a chunk


def test_says_where_logits_are_not_finite(model: Mixtral) -> None:
    weight = model.lm_head.weight
    kept = weight.clone()
    try:
        weight.fill_(torch.nan)
        with pytest.raises(RequestError, match="logits after tokens 0 to 7 are not finite"):
            negative_log_likelihood(model, ids_of(20), 8, 4)
    finally:
        weight.copy_(kept)


def test_equals_transformers(engine: Engine) -> None:
    text = Path(perplexity.__file__).read_text()
    ids = engine.tokenizer.encode(text)[:300]
    peer = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = peer(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
    assert negative_log_likelihood(engine.model, ids, 1024, 512) == pytest.approx(expected, rel=1e-5)


def test_the_command_reports_what_the_model_says(run: Run, engine: Engine) -> None:
    Path("short").write_text("x", "utf-8")
    status, out, err = run("--text", "text", "short", "--window", 128, "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    ids = engine.tokenizer.encode(TEXT)
    nats = negative_log_likelihood(engine.model, ids, 128, 64, chunk=50)
    one = report["texts"]["text"]
    assert (one["tokens"], one["bytes"]) == (len(ids) - 1, len(TEXT.encode()))
    assert one["nats"] == pytest.approx(nats, rel=1e-5)
    assert one["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert report["texts"]["short"]["tokens"] >= 1
    for name in ("nats", "tokens", "bytes", "seconds"):
        assert report[name] == pytest.approx(sum(text[name] for text in report["texts"].values()))
    assert (report["window"], report["stride"], report["dtype"]) == (128, 64, "float32")
    assert "17.9 MB" in report["checkpoint"]


def test_keys_and_values_in_8_bits_cost_next_to_nothing(run: Run) -> None:
    found = {}
    for bits in (16, 8):
        status, out, _ = run("--text", "text", "--window", 128, "--json", "--kv", bits)
        report = json.loads(out)
        assert status == 0 and report["kv"] == bits
        found[bits] = report["nats"] / report["tokens"]
    assert 0 < abs(found[8] - found[16]) < 0.005


def test_the_command_for_people(run: Run) -> None:
    status, out, err = run(DEMO, "--text", "text", "--stride", "700", "--context", "900")
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 3)
    assert lines[0].split() == ["tokens", "bytes", "perplexity", "bits", "per", "byte"]
    assert lines[1].split()[0] == "text" and "window 900, stride 700" in lines[2]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--text", "absent"], 1, "absent: No such file or directory"),
        (["--text", "."], 1, ".: Is a directory"),
        (["--text", "empty"], 1, "empty is empty"),
        (["--text", "latin"], 1, "latin is not UTF-8: byte 0xe9 at offset 3"),
        (["nowhere", "--text", "text"], 1, "nowhere"),
        (["--text", "text", "--window", "1"], 2, "--window is 1, and must be at least 2"),
        (["--text", "text", "--window", "1025"], 2, "this model was made for at most 1024"),
        (["--text", "text", "--window", "20", "--context", "10"], 2, "at most the --context of 10"),
        (["--text", "text", "--window", "20", "--stride", "21"], 2, "--stride is 21, and must be at most"),
        (["--text", "text", "--stride", "1025"], 2, "--stride is 1025, and must be at most"),
        (["--text", "text", "--stride", "0"], 2, "--stride is 0, and must be at least 1"),
        ([], 2, "--text"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_line(run: Run, words: list[str], status: int, message: str) -> None:
    Path("empty").touch()
    Path("latin").write_bytes(b"caf\xe9")
    got, out, err = run(*words)
    assert (got, out) == (status, "")
    last = err.splitlines()[-1]
    assert message in last and "error: " in last
    assert err.count("\n") == 1 or "usage:" in err


def test_a_text_without_tokens_is_refused() -> None:
    tokenizer = SimpleNamespace(encode=lambda text: [1])
    engine: Any = SimpleNamespace(tokenizer=tokenizer)
    with pytest.raises(RequestError, match="the text of 2 characters comes to no token"):
        perplexity.score(engine, "  ", 8, 4)


def test_line_ends_are_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "dos").write_bytes(b"a\r\nb\r\n")
    assert read_text(tmp_path / "dos") == "a\r\nb\r\n"
