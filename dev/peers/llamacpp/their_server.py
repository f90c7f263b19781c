"""llama.cpp's server as a side: a process of `llama-server`. Ids are random.

Answers are not streamed, since the server itself says how long it decoded each of them.
"""

import json
import subprocess
from typing import Any

from dev.peers.llamacpp.program import Program
from dev.peers.llamacpp.serving import serve

SAMPLING = {  # by probability alone, so that texts do not run in circles
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True, "cache_prompt": False,
}  # fmt: skip


class TheirServer:
    def load(
        self, server: str, path: str, threads: int, parallel: int, context: int, vocab: int
    ) -> dict[str, Any]:
        """Start the program `server` with `parallel` slots, each for a text of `context` tokens."""
        words = [
            server, "--model", path, "--threads", threads, "--parallel", parallel,
            "--ctx-size", parallel * context, "--no-kv-unified", "--cache-ram", 0,
        ]  # fmt: skip
        self.vocab, self.program = vocab, Program(words, parallel)
        return {"version": version(server)}

    def together(self, requests: int, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
        """See `Program.together`. No expert is copied."""
        found = self.program.together(self.complete, requests, prompt, tokens, seed, self.vocab)
        return found | {"copied": 0, "hit_ratio": 1.0}

    def complete(self, ids: list[int], tokens: int, seed: int) -> float:
        asked = {"prompt": ids, "n_predict": tokens, "seed": seed} | SAMPLING
        with self.program.answer("POST", "/completion", json.dumps(asked)) as response:
            timings = json.loads(response.read())["timings"]
        if timings["predicted_n"] != tokens:
            raise ArithmeticError(f"llama-server made {timings['predicted_n']} tokens of {tokens}")
        return (tokens - 1) / timings["predicted_ms"] * 1e3


def version(server: str) -> str:
    """The first line that the program says of itself."""
    done = subprocess.run([server, "--version"], capture_output=True, text=True)
    return next(iter((done.stdout + done.stderr).split("\n")))


if __name__ == "__main__":
    side = TheirServer()
    try:
        serve(side)
    finally:
        if hasattr(side, "program"):
            side.program.close()
