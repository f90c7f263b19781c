"""Several requests at once by our service. Ids are random, and their texts are decoded as a user's are."""

import queue
import random
import time
import warnings
from functools import partial
from typing import Any

from dev.peers.llamacpp.serving import serve
from runtime.answer import Token
from runtime.batching.service import Service, Work
from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.options import EngineOptions, SamplingParams

FIRST_ID = 3  # those before are not text
PATIENCE = 300.0  # seconds for the next token


class OurService:
    def load(self, path: str, **options: Any) -> dict[str, Any]:
        """Load a model for as many requests at once as the option `parallel` says."""
        warnings.filterwarnings("ignore", ".*the tokenizer lacks")  # it is the demo's
        self.engine = Engine.load(path, EngineOptions(device="cpu", **options))
        self.service = Service(self.engine, queue=1)
        return {"dtype": str(self.engine.dtype).removeprefix("torch.")}

    def together(self, requests: int, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
        """Answer that many requests at once, of `prompt` random ids and `tokens` new tokens each.

        `each` are the tokens per second of every request from its first token on, `copied` the experts'
        bytes that were copied, and `hit_ratio` the share of experts that needed no copy.
        """
        tokenizer, ids = self.engine.tokenizer, random.Random(seed)
        prompts = [
            [ids.randrange(FIRST_ID, tokenizer.vocab_size) for _ in range(prompt)] for _ in range(requests)
        ]
        before, start = self.engine.stats(), time.perf_counter()
        arrivals: queue.SimpleQueue[tuple[int, float, Token | RequestError]] = queue.SimpleQueue()

        def arrive(i: int, got: Token | RequestError) -> None:
            arrivals.put((i, time.perf_counter(), got))

        for i, text in enumerate(prompts):
            params = SamplingParams(
                max_new_tokens=tokens, temperature=1.0, top_p=1.0, seed=seed + i, ignore_eos=True
            )
            work = Work(text, params, tokenizer.stream(text), reuse=False)
            self.service.submit(work, partial(arrive, i))
        times: list[list[float]] = [[] for _ in prompts]
        for _ in range(requests * tokens):
            i, at, got = arrivals.get(timeout=PATIENCE)
            if isinstance(got, Exception):
                raise got
            times[i].append(at)
        spent = self.engine.stats() - before
        return {
            "seconds": max(of_one[-1] for of_one in times) - start,
            "each": [(tokens - 1) / (of_one[-1] - of_one[0]) for of_one in times],
            "copied": spent.copied_bytes,
            "hit_ratio": spent.hit_ratio,
        }


if __name__ == "__main__":
    serve(OurService())
