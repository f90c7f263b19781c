"""Where a text may depend on other requests, the engine says so; where it says nothing, it does not."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime import Engine, EngineOptions, SamplingParams
from runtime.batching.batch import Work
from runtime.batching.promise import caveats
from runtime.engine import DEMO
from tests.quantized import quantizer

MAKE = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> MAKE:
    return quantizer(DEMO, tmp_path_factory.mktemp("promise"))


@pytest.mark.parametrize(
    ("formats", "options", "expected"),
    [
        ((4, 4, 8), {}, []),
        ((4, "3g128", 16), {"slots": 4, "berths": 40}, []),
        ((8, 2, 16), {"dtype": "float16", "kv": 8}, []),
        ((16, 4, 16), {}, ["beginning"]),
        ((4, 4, 8), {"dtype": "float32"}, ["beginning"]),
        ((4, 4, 8), {"slots": 4, "misses": "compute"}, ["misses is 'compute'"]),
        (None, {}, ["beginning"]),
    ],
)
def test_what_is_said(make: MAKE, formats: Any, options: dict[str, Any], expected: list[str]) -> None:
    folder = make(*formats) if formats else None
    with Engine.load(folder, EngineOptions(device="cpu", context=128, **options)) as engine:
        said = engine.batch().caveats
        assert len(said) == len(expected) and all(
            word in line for word, line in zip(expected, said, strict=True)
        )


def test_without_numba(make: MAKE, without_numba: str) -> None:
    with pytest.warns(RuntimeWarning), Engine.load(make(4, 4, 8), EngineOptions(device="cpu")) as engine:
        assert "beginning" in caveats(engine.runner)[0]


def test_a_gpu() -> None:
    runner: Any = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, cache=None, company=None,
        config=SimpleNamespace(head_dim=128, heads=32, kv_heads=8, hidden=4096),
    )  # fmt: skip
    assert len(caveats(runner)) == 2 and "a GPU computes" in caveats(runner)[0]


@pytest.mark.parametrize("kv", [16, 8])
def test_beginnings_of_other_requests_change_nothing(make: MAKE, kv: int) -> None:
    """Where nothing is said: prompts that share beginnings, at once and one after the other."""
    options = EngineOptions(device="cpu", context=192, parallel=3, slots=4, kv=kv)
    with Engine.load(make(4, 4, 8), options) as engine:
        assert not engine.batch().caveats
        ids = [(n * n * 5 + n) % 1800 + 100 for n in range(120)]
        prompts = [[*ids[:n], 90 + n] for n in (5, 119, 40, 77, 40, 100, 3, 118)]
        params = SamplingParams(max_new_tokens=9, temperature=0.9, seed=1, ignore_eos=True)
        expected = [list(engine.generate(prompt, params)) for prompt in prompts]
        with engine.batch() as batch:
            batch.chunk = 50
            requests = [batch.add(Work(p, params, engine.tokenizer.stream(p))) for p in prompts]
            got: dict[Any, list[Any]] = {request: [] for request in requests}
            while batch.busy:
                for request, result in batch.step():
                    got[request].append(result)
        assert list(got.values()) == expected
        assert sum(request.reused for request in requests) > 200
