"""Requests whose texts are known: each was written alone, without a server."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime import Engine, SamplingParams

BEGINNINGS = ("def read_bytes(obj):", "import ", "class Reader:\n    def", "for name in", "x = 1\ny =")


@dataclass(frozen=True)
class Known:
    """A request's body, and the text that it gives alone."""

    body: Mapping[str, Any]
    text: str


def write_alone(engine: Engine, count: int, seed: int) -> list[Known]:
    """Random requests. Prompts have beginnings in common, which KV caches keep."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        prompt = draw.choice(BEGINNINGS) * draw.choice((1, 1, 2, 9)) + draw.choice(("", " ", "\n", "a"))
        sampling = {
            "temperature": draw.choice((0.0, 0.7, 1.3)),
            "top_p": draw.choice((0.5, 0.95, 1.0)),
            "seed": draw.randrange(1000),
        }
        limit = draw.choice((1, 5, 20, 60))
        params = SamplingParams(max_new_tokens=limit, **sampling)  # type: ignore[arg-type]
        text = "".join(token.text for token in engine.generate(prompt, params))
        made.append(Known({"prompt": prompt, "max_tokens": limit, **sampling}, text))
    return made
