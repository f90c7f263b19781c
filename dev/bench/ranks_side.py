"""One process of those that `ranks` compares: an engine by itself, or one rank of several. Ids are
random.

Only rank 0, or an engine by itself, is asked to compute. Another rank follows in a thread, and meanwhile
tells its memory and how long it has computed.
"""

import random
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from dev.peers.llamacpp.serving import serve
from runtime.batching.batch import Work
from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.options import EngineOptions, SamplingParams
from runtime.ranks.follower import Follower
from runtime.ranks.membership import Membership
from runtime.ranks.pipeline import Pipeline
from tools.bench.decode import bytes_per_token

FIRST_ID = 3  # those before are not text
Result = TypeVar("Result")


class RankSide:
    def __init__(self) -> None:
        self.timed = 0.0  # seconds: rank 0 waited for others, another rank computed

    def load(self, path: str, rank: int, **options: Any) -> dict[str, Any]:
        """Load a model, or a part of it. A rank other than 0 does it while it answers."""
        warnings.filterwarnings("ignore", ".*the tokenizer lacks")  # it is the demo's
        given = EngineOptions(device="cpu", **options)
        if rank:
            threading.Thread(target=self.follow, args=(path, given), daemon=True).start()
            return {}
        self.engine = Engine.load(path, given)
        runner = self.engine.runner
        if isinstance(passes := runner.passes, Pipeline):
            passes.take = self.clock(passes.take)  # type: ignore[method-assign]
        self.depth, self.kv = passes.depth, runner.take_kv()
        return {
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "chunk": self.engine.plan.chunk,
            "layers": [part.layers for part in plans.parts] if (plans := self.engine.rank_plans) else [],
            "bytes_per_token": bytes_per_token(self.engine.model) if plans is None else 0,
        }

    def follow(self, path: str, options: EngineOptions) -> None:
        with suppress(RequestError), Engine.load(path, options) as engine:  # rank 0 tells, or has been ended
            company = engine.runner.company
            assert isinstance(company, Membership) and isinstance(company.role, Follower)
            company.role.obey = self.clock(company.role.obey)  # type: ignore[method-assign]
            engine.follow()

    def clock(self, work: Callable[..., Result]) -> Callable[..., Result]:
        """The same work, whose time is added up."""

        def timed(*given: Any) -> Result:
            began = time.perf_counter()
            try:
                return work(*given)
            finally:
                self.timed += time.perf_counter() - began

        return timed

    def spent(self) -> dict[str, float]:
        """Seconds since the process began: the processor's, and those that are added up."""
        return {"processor": time.process_time(), "timed": self.timed}

    def limit(self, depth: int | None) -> None:
        """Limit the passes under way at once to this number; None is an engine's own."""
        self.engine.runner.passes.depth = depth or self.depth  # type: ignore[misc]

    def prompt(self, tokens: int, seed: int) -> dict[str, Any]:
        """Compute a prompt from an empty KV cache. Returns the likeliest next id."""
        self.kv.truncate(0)
        return {"ids": [self.forward(self.random_ids(tokens, seed))]}

    def decode(self, tokens: int, seed: int) -> dict[str, Any]:
        """Add one random token after the other. Returns the likeliest id after each."""
        return {"ids": [self.forward([i]) for i in self.random_ids(tokens, seed)]}

    def forward(self, ids: list[int]) -> int:
        runner = self.engine.runner
        with runner.working():
            return int(runner.forward(ids, self.kv).argmax())

    def random_ids(self, count: int, seed: int) -> list[int]:
        chance = random.Random(seed)
        return [chance.randrange(FIRST_ID, self.engine.tokenizer.vocab_size) for _ in range(count)]

    def seat(self, texts: int, prompt: int, tokens: int, seed: int) -> None:
        """Begin to write this number of texts together: compute all prompts."""
        self.batch = self.engine.batch()
        for i in range(texts):
            ids = self.random_ids(prompt, seed + i)
            params = SamplingParams(
                max_new_tokens=tokens, temperature=1.0, top_p=1.0, seed=seed + i, ignore_eos=True
            )
            self.batch.add(Work(ids, params, self.engine.tokenizer.stream(ids), reuse=False))
        begun = set[int]()
        while len(begun) < texts:
            begun |= {id(request) for request, _ in self.batch.step()}

    def write(self, tokens: int) -> dict[str, Any]:
        """Write on until all texts together have this number of new tokens."""
        before, made = self.engine.stats(), 0
        while made < tokens:
            for _, got in self.batch.step():
                if isinstance(got, Exception):
                    raise got
                made += 1
        return {"tokens": made, "hit_ratio": (self.engine.stats() - before).hit_ratio}

    def leave(self) -> None:
        """Give the texts up, and wait until no rank computes any more."""
        self.batch.close()
        if isinstance(passes := self.engine.runner.passes, Pipeline):
            while passes.under_way:
                passes.take()


if __name__ == "__main__":
    serve(RankSide())
