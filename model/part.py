"""Parts of a model: consecutive layers, which one of several devices computes.

A part is handled as a model of fewer layers, whose first own layer is `layers.0`. `Checkpoint.part` opens it,
`Mixtral` computes it, and a `KVCache` of its configuration holds its keys and values. Hardly anything else
knows of parts. Hidden states [..., D] go from each part to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from model.config import ModelConfig
from model.errors import ModelError
from model.parameters import AFTER_LAYERS, BEFORE_LAYERS


@dataclass(frozen=True)
class Part:
    """Consecutive layers of a model. If it `embeds`, it begins with token ids instead of hidden states. If it
    `heads`, it ends with logits, and has the last norm and the head.

    >>> Part(4, 2, embeds=False, heads=True)
    Part(first=4, layers=2, embeds=False, heads=True)
    """

    first: int  # layer of the whole model
    layers: int
    embeds: bool
    heads: bool

    @staticmethod
    def whole(config: ModelConfig) -> "Part":
        """A whole model as its only part."""
        return Part(0, config.layers, embeds=True, heads=True)

    @staticmethod
    def split(config: ModelConfig, counts: Sequence[int]) -> tuple["Part", ...]:
        """The parts of ranks 0, 1, ..., which have `counts` layers.

        Rank 0 writes the text. It has the last layers and the head, so that logits and samples need not
        travel. Rank 1 embeds and has the first layers, then come rank 2 and so on. A single rank has
        everything. Raises `ModelError` if a rank has no layer, or if they do not add up to the model's.

        >>> from model.shapes import MIXTRAL_8X7B
        >>> [(part.first, part.layers, part.embeds, part.heads) for part in Part.split(MIXTRAL_8X7B, (10, 14, 8))]
        [(22, 10, False, True), (0, 14, True, False), (14, 8, False, False)]
        """  # noqa: E501
        if not counts or min(counts) < 1 or sum(counts) != config.layers:
            dealt = " + ".join(map(str, counts)) or "none"
            raise ModelError(
                f"the ranks' layers are {dealt}, and must be {config.layers} in all with at least 1 for each"
            )
        ring = [*counts[1:], counts[0]]  # in the order of layers
        starts = [0, *accumulate(ring)]
        last = len(ring) - 1
        parts = [Part(starts[i], layers, i == 0, i == last) for i, layers in enumerate(ring)]
        return (parts[last], *parts[:last])

    def config(self, config: ModelConfig) -> ModelConfig:
        """The configuration of this part as a model of its own."""
        return replace(config, layers=self.layers)

    def own_name(self, name: str) -> str | None:
        """What this part calls a parameter or stream of the whole model; None if it is not of this part.

        >>> part = Part(4, 2, embeds=True, heads=False)
        >>> part.own_name("layers.5.self_attn.o_proj.codes"), part.own_name("embed_tokens.weight")
        ('layers.1.self_attn.o_proj.codes', 'embed_tokens.weight')
        >>> part.own_name("layers.6.self_attn.o_proj.codes"), part.own_name("norm.weight")
        (None, None)
        """
        kind, _, rest = name.partition(".")
        if kind == "layers":
            number, _, rest = rest.partition(".")
            own = int(number) - self.first
            return f"layers.{own}.{rest}" if 0 <= own < self.layers else None
        assert kind in BEFORE_LAYERS + AFTER_LAYERS, name
        return name if (self.embeds if kind in BEFORE_LAYERS else self.heads) else None
