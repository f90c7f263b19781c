"""Stands in for our service: it says what a turn took without taking it."""

from typing import Any

from dev.peers.llamacpp.serving import serve


class Fake:
    def load(self, path: str, parallel: int, context: int, threads: int, offload: str, **some: Any) -> None:
        assert (parallel, context, threads) == (2, 10, 1)
        assert some == ({"slots": 2, "link_gbps": 2.0} if offload == "always" else {})
        self.seconds = {"never": 0.002, "always": 0.004}[offload]

    def together(self, requests: int, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
        assert prompt == 4
        each = [1000.0] * requests
        return {"seconds": self.seconds, "cpu_seconds": 1.0, "each": each, "copied": 1e6, "hit_ratio": 0.5}


if __name__ == "__main__":
    serve(Fake())
