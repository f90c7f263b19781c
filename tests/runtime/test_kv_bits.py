"""`kv` of an engine's options: what a text and a conversation over keys and values in 8 bits are like."""

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import Engine, EngineOptions, SamplingParams
from runtime.batching.batch import Work
from runtime.engine import DEMO
from tests.quantized import quantize_folder

PROMPT = "def read_bytes(obj):"
PARAMS = SamplingParams(max_new_tokens=24, temperature=0)


def load(folder: Path | None = None, **options: Any) -> Engine:
    wishes = {"device": "cpu", "dtype": "float32", "context": 200} | options
    return Engine.load(folder, EngineOptions(**wishes))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(kv=8)


def text(engine: Engine) -> str:
    return "".join(token.text for token in engine.generate(PROMPT, PARAMS))


def test_logits_are_nearly_those_of_16_bits(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT * 8)
    with load() as wide:
        expected, got = wide.logits(ids).softmax(-1), engine.logits(ids).softmax(-1)
    assert 1e-5 < (got - expected).abs().max() < 0.05


def test_the_memory_is_what_the_plan_says(engine: Engine) -> None:
    with engine.session() as session:
        tensors = [t for layer in session.kv.layers for t in (layer.k, layer.v, *(layer.scales or ()))]
    assert sum(t.nbytes for t in tensors) == engine.plan.kv_bytes
    wide = Engine.plan(None, EngineOptions(device="cpu", dtype="bfloat16", context=200)).kv_bytes
    K = engine.model.config.head_dim
    assert engine.plan.kv_bytes * 2 * K == wide * (K + 4)


@pytest.mark.parametrize(
    "options", [{"offload": "always", "slots": 3}, {"offload": "always", "slots": 2, "prefetch": 0}]
)
def test_offloaded_experts_change_nothing(engine: Engine, options: dict[str, Any]) -> None:
    with load(kv=8, **options) as other:
        assert text(other) == text(engine)


def test_a_conversation_that_goes_on_is_one_that_is_computed_anew(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT * 4)
    with engine.session() as session:
        session.prefill(ids[:9])
        session.prefill([*ids[:9], 5, 6, 7])
        session.step(8)
        went_on = session.prefill(ids)
    with engine.session() as session:
        session.prefill(ids[:9])
        anew = session.prefill(ids)
    assert torch.equal(went_on, anew)


def test_requests_share_the_codes_of_a_common_beginning(tmp_path: Path) -> None:
    """And write what each writes alone, which takes the kernels of a CPU."""
    pytest.importorskip("numba")
    folder = quantize_folder(DEMO, tmp_path / "4", "4")
    with load(folder, dtype="bfloat16", kv=8, parallel=3) as engine:
        ids = engine.tokenizer.encode("class Reader:\n    def __init__(self, file):\n        self.file = ")
        texts = [ids + engine.tokenizer.encode(f"{n} + file")[1:] for n in range(4)]
        expected = [[token.id for token in engine.generate(text, PARAMS)] for text in texts]
        with engine.batch() as batch:
            requests = [batch.add(Work(text, PARAMS, engine.tokenizer.stream(text))) for text in texts]
            got: dict[Any, list[int]] = {request: [] for request in requests}
            while batch.busy:
                for request, token in batch.step():
                    got[request].append(token.id)  # type: ignore[union-attr]
        assert list(got.values()) == expected
        assert all(request.reused >= len(ids) for request in requests[1:])
