"""How many passes of a prompt are under way at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.kv_cache import KVCache
from runtime import Engine, EngineOptions


class Counting:
    """`Passes` that compute nothing, and note what is begun and finished."""

    def __init__(self, depth: int, vocab: int) -> None:
        self.depth, self.vocab = depth, vocab
        self.begun, self.finished, self.most = list[int](), list[int](), 0

    def begin(self, ids: Sequence[int], kv: KVCache, past: int, last: bool = True) -> Any:
        self.begun.append(past)
        self.most = max(self.most, len(self.begun) - len(self.finished))

        def finish() -> torch.Tensor:
            self.finished.append(past)
            kv.length = past + len(ids)
            return torch.zeros(1, self.vocab)

        return finish


@pytest.mark.parametrize(("depth", "most"), [(1, 1), (2, 3), (4, 5)])
def test_one_chunk_more_than_ranks(depth: int, most: int) -> None:
    """It waits at the first rank. In one process, and with one pass at a time, there is none."""
    with Engine.load(None, EngineOptions(device="cpu", threads=1, context=1024)) as engine:
        runner, chunk, kv = engine.runner, 100, engine.runner.take_kv()
        runner.passes = passes = Counting(depth, engine.config.vocab)  # type: ignore[assignment]
        runner.plan = replace(runner.plan, chunk=chunk)
        runner.forward(list(range(3, 953)), kv)
        assert passes.begun == passes.finished == list(range(0, 950, chunk)) and passes.most == most
        assert kv.length == 950
