"""An engine computes the same, whatever the program around it has set, and leaves those settings alone."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from runtime import Engine, EngineOptions, SamplingParams
from runtime.process.ambient import SETTINGS, Use, default_settings
from runtime.process.ambient import plain as process

TEXT = "def add(a, b):"
GREEDY = SamplingParams(max_new_tokens=5, temperature=0)
SAMPLED = SamplingParams(
    max_new_tokens=5, temperature=1, seed=3, top_k=20, min_p=0.01, repetition_penalty=1.1,
    logit_bias={300: 1.0},
)  # fmt: skip


@contextlib.contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


HOSTILE: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "precision": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
}

Answer = tuple[list[tuple[int, float]], torch.Tensor]


def answers(options: EngineOptions) -> Answer:
    with Engine.load(None, options) as engine:
        tokens = [(t.id, t.logprob) for params in (GREEDY, SAMPLED) for t in engine.generate(TEXT, params)]
        return tokens, engine.logits(engine.tokenizer.encode(TEXT))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(request: pytest.FixtureRequest) -> tuple[EngineOptions, Answer]:
    options = EngineOptions(device="cpu", dtype=request.param, slots=3, context=64)
    return options, answers(options)


@pytest.mark.parametrize("name", HOSTILE)
def test_results_are_the_same(name: str, plain: tuple[EngineOptions, Answer]) -> None:
    options, (tokens, logits) = plain
    with HOSTILE[name]():
        inside = [setting.read() for setting in SETTINGS]
        got_tokens, got_logits = answers(options)
        assert [setting.read() for setting in SETTINGS] == inside
    assert got_tokens == tokens
    assert got_logits.dtype == torch.float32 and torch.equal(got_logits, logits)


def test_two_forwards_at_once_leave_what_they_found() -> None:
    """The one that ends last restores the settings that either changed."""
    device = torch.device("cpu")
    first, second = default_settings(device), default_settings(device)
    with HOSTILE["precision"]():
        first.__enter__()
        second.__enter__()
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        first.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_a_forward_that_never_ended_holds_nothing() -> None:
    """Ctrl-C between two lines of it can do that."""
    with HOSTILE["precision"]():
        process.begin(Use())
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        with default_settings(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
