"""Write an eviction policy, and compare its hits with those of the policies that come with the runtime.

    python examples/policy.py
    python examples/policy.py path/to/mixtral-4-3g128

Each layer gets 4 slots for its 8 experts. The text is the same under every policy; only the copies differ.
"""

import sys
from collections.abc import Collection

from runtime import Engine, EngineOptions, SamplingParams
from runtime.experts.policy import policy_name


class LRU2:
    """Evicts the expert whose last use but one is the oldest: a single use keeps no expert for long.

    An engine makes one for each layer. The three methods are described in `runtime.experts.policy.Policy`.
    """

    def __init__(self, seed: int, layer: int) -> None:
        self.now = 0
        self.uses: dict[int, tuple[int, int]] = {}  # by expert: the last use but one, and the last

    def used(self, expert: int) -> None:
        self.now += 1
        self.uses[expert] = (self.uses.get(expert, (0, 0))[1], self.now)

    def victim(self, candidates: Collection[int]) -> int:
        return min(candidates, key=lambda expert: self.uses[expert])

    def evicted(self, expert: int) -> None:
        pass  # an expert that comes back is remembered


def main(model: str | None = None) -> None:
    params = SamplingParams(max_new_tokens=100, temperature=0.5, seed=4, ignore_eos=True)
    for policy in ("lru", "lfu", "static", LRU2):
        with Engine.load(model, EngineOptions(slots=4, policy=policy, lookahead=0)) as engine:
            for _ in engine.generate("import os\n\nclass ", params):
                pass
            stats = engine.stats()
            print(f"{policy_name(policy):6} {stats.hit_ratio:6.1%} hits, {stats.misses:4} copies")


if __name__ == "__main__":
    main(*sys.argv[1:])
