"""A step through the decoders of all parts has the bits of a step of the whole model.

This runs on a CPU with stand-ins for kernels and graphs.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.part import Part
from model.quant.backends.blocks import Blocks
from runtime.gpu import warm_up
from runtime.gpu.graphs import Work
from runtime.runner import ModelRunner
from tests.parts import in_order, splits
from tests.quantized import quantize_folder
from tests.runtime.gpu.plain_step import Recorded, use_plain_kernels
from tests.runtime.parts import load_part

PROMPT, IDS, LAYERS = [5, 6, 7], [8, 3, 40], 3


@pytest.fixture(scope="module")
def folder(variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = variant(hidden=64, ffn=64, layers=LAYERS, experts=5, context=96)
    return quantize_folder(plain, tmp_path_factory.mktemp("quantized") / "4", "4")


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """All captured work."""
    captured: list[Work] = []
    capture = Recorded.capture

    def noting(self: Recorded, work: Work) -> Work:
        captured.append(work)
        return capture(self, work)

    use_plain_kernels(monkeypatch)
    monkeypatch.setattr("model.quant.backends.BACKENDS", (Blocks,))
    monkeypatch.setattr("model.linear.packs", lambda weight: False)
    monkeypatch.setattr("runtime.gpu.decoder.CudaGraphs", lambda device: Recorded())
    monkeypatch.setattr(Recorded, "capture", noting)
    return captured


@torch.inference_mode()
def logits(runners: Sequence[ModelRunner], dtype: torch.dtype) -> Tensor:
    """Logits after a prompt, and after each of some ids, which are decoded one by one: [1 + T, V]."""
    texts = [runner.take_kv() for runner in runners]
    x = runners[0].model.embed(torch.tensor([PROMPT]))
    for runner, kv in zip(runners, texts, strict=True):
        x = runner.model.through(x, kv)
    rows = [runners[-1].model.logits(x, last=True)[0, 0].float()]
    for i in IDS:
        given: Any = i
        for runner, kv in zip(runners, texts, strict=True):
            assert runner.decoder is not None
            given = runner.decoder.step(given, kv).clone()
            assert given.dtype == (torch.float32 if runner.model.heads else dtype)
        rows.append(given)
    assert [kv.length for kv in texts] == [len(PROMPT) + len(IDS)] * len(runners)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("dtype", "cuts", "options"),
    [
        ("float32", [(1, 2)], {}),
        ("bfloat16", [(2, 1)], {"slots": 3}),
        ("bfloat16", [*splits(LAYERS)], {"kv": 8, "graphs": False}),
    ],
)
def test_steps(folder: Path, dtype: str, cuts: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    made: dict[Part | None, ModelRunner] = {}
    with ExitStack() as after:

        def load(part: Part | None) -> ModelRunner:
            if part not in made:
                made[part] = load_part(folder, part, dtype=dtype, map=False, **options)
                after.callback(made[part].close)
            return made[part]

        whole = load(None)
        expected = logits([whole], whole.dtype)
        assert expected.shape == (1 + len(IDS), whole.config.vocab) and expected.std() > 0.1
        for layers in cuts:
            runners = [load(part) for part in in_order(whole.config, layers)]
            assert torch.equal(logits(runners, whole.dtype), expected), layers


def test_parts_warm_up_alone(folder: Path, captured: list[Work]) -> None:
    """They make the graphs of their first texts, and leave everything else as it was."""
    parts = [Part(0, 1, True, False), Part(1, 1, False, False), Part(2, 1, False, True)]
    with ExitStack() as after:
        runners = [load_part(folder, part, dtype="float32", map=False, slots=3) for part in parts]
        for runner in runners:
            after.callback(runner.close)
            warm_up.warm_up(runner)
            assert runner.stats().hits == 0 and [kv.length for kv in runner.idle_kvs] == [3]
        assert len(captured) == 2 * len(parts)
        warm = logits(runners, torch.float32)
        assert len(captured) == 2 * len(parts), "the first texts' were made"
        assert torch.equal(logits(runners, torch.float32), warm)  # with new KV caches
        assert len(captured) == 4 * len(parts)
