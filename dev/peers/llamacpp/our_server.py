"""Our server as a side: a process of `runtime.serve`. Ids are random.

Answers are streams, whose first and last pieces tell how long each was decoded.
"""

import json
import sys
import time
from typing import Any

from dev.peers.llamacpp.program import Program
from dev.peers.llamacpp.serving import serve

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "ignore_eos": True, "cache_prompt": False}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
DATA = b"data: {"


class OurServer:
    def load(self, path: str, vocab: int, **options: Any) -> None:
        """Start a server of that model with such engine options."""
        words: list[object] = [
            sys.executable,
            "-m",
            "runtime.serve",
            "--quiet",
            "--device",
            "cpu",
            "--model",
            path,
        ]
        for name, value in options.items():
            words += [f"--{name}", value]
        self.vocab, self.program = vocab, Program(words, options["parallel"])

    def together(self, requests: int, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
        """See `Program.together`. No expert is copied."""
        found = self.program.together(self.complete, requests, prompt, tokens, seed, self.vocab)
        return found | {"copied": 0, "hit_ratio": 1.0}

    def complete(self, ids: list[int], tokens: int, seed: int) -> float:
        asked = {"prompt": ids, "max_tokens": tokens, "seed": seed} | SAMPLING | STREAM
        times = []
        with self.program.answer("POST", "/v1/completions", json.dumps(asked)) as response:
            for line in response:
                if line.startswith(DATA):
                    times.append(time.perf_counter())
                    last = line
        if (usage := json.loads(last.removeprefix(b"data: ")).get("usage")) is None:
            raise OSError(f"the stream ended with {last.decode()}")
        if (made := usage["completion_tokens"]) != tokens:
            raise ArithmeticError(f"the server made {made} tokens of {tokens}")
        return (tokens - 1) / (times[-2] - times[0])  # the last line has the usage


if __name__ == "__main__":
    side = OurServer()
    try:
        serve(side)
    finally:
        if hasattr(side, "program"):
            side.program.close()
