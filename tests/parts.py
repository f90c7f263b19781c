"""Parts of a model, one after the other in this process, for tests that compare them with the whole."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.part import Part


def splits(layers: int, most: int = 4) -> Iterator[tuple[int, ...]]:
    """All ways to cut layers into 1 to `most` parts, as numbers of layers in the order of layers."""
    for count in range(1, most + 1):
        for cuts in combinations(range(1, layers), count - 1):
            edges = (0, *cuts, layers)
            yield tuple(b - a for a, b in pairwise(edges))


def in_order(config: ModelConfig, layers: Sequence[int]) -> list[Part]:
    """Parts with these numbers of layers, in the order of layers."""
    last, *others = Part.split(config, (layers[-1], *layers[:-1]))
    return [*others, last]


def needs(part: Part, tensor: str, tied: bool = False) -> bool:
    """Whether a part needs a tensor of the files, by its name there. Embeddings that are `tied` are the head,
    too."""
    if layer := re.search(r"\blayers\.(\d+)\.", tensor):
        return part.first <= int(layer[1]) < part.first + part.layers
    module = tensor.removeprefix("model.").partition(".")[0]
    assert module in ("embed_tokens", "tok_embeddings", "norm", "lm_head", "output"), tensor
    if tied and module != "norm":
        return part.embeds or part.heads
    return part.embeds if "embed" in module else part.heads


def spoiled(folder: Path, made: Path, part: Part, tied: bool = False) -> Path:
    """A copy of a checkpoint, below `made`, in which all that the part does not need is overwritten: what is
    not quantized is NaN."""
    copy = shutil.copytree(folder, made / f"{folder.name}-{part.first}-{part.layers}")
    checkpoint = open_checkpoint(copy)
    others = [piece for piece in checkpoint.layout.pieces if not needs(part, piece.tensor, tied)]
    assert others or part == Part.whole(checkpoint.config)
    for piece in others:
        with piece.path.open("r+b") as file:
            file.seek(piece.offset)
            file.write(b"\xff" * piece.bytes)
    return copy


class Chain:
    """Parts of a model in the order of layers, and texts with a KV cache in each of them."""

    def __init__(self, models: Sequence[Mixtral]) -> None:
        self.models = models

    def new_text(self, batch: int = 1, capacity: int = 64, bits: int = 16) -> list[KVCache]:
        return [
            KVCache.allocate(model.config, batch, capacity, model.dtype, model.device, bits)
            for model in self.models
        ]

    def forward(self, ids: Tensor, text: Sequence[KVCache] | None = None, last: bool = False) -> Tensor:
        x = self.models[0].embed(ids)
        for n, model in enumerate(self.models):
            x = model.through(x, text[n] if text else None)
        return self.models[-1].logits(x, last)

    def decode(self, ids: Tensor, texts: Sequence[Sequence[KVCache]]) -> Tensor:
        x = self.models[0].embed(ids)
        for n, model in enumerate(self.models):
            x = model.through_each(x, [text[n] for text in texts])
        return self.models[-1].logits_each(x)


def work(chain: Chain, vocab: int, bits: int = 16) -> list[Tensor]:
    """All that models are asked for: texts without a KV cache, prompts in chunks, tokens of one text and of
    several. Ends with the keys and values of the first text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (2, 24), generator=generator)
    out = [chain.forward(ids[:, :9]), chain.forward(ids[:1, :7], last=True)]
    both = chain.new_text(batch=2, bits=bits)
    out += [chain.forward(part, both, last=part.shape[1] < 3) for part in ids.split([5, 9, 1, 2, 7], dim=1)]
    texts = [chain.new_text(bits=bits) for _ in range(3)]
    for n, text in enumerate(texts):
        out.append(chain.forward(ids[:1, n : 4 * n + 1], text, last=True))
    for count in (3, 2, 1, 3):
        out.append(chain.decode(ids[0, count : 2 * count], texts[:count]))
    lengths = [[kv.length for kv in text] for text in [both, *texts]]
    assert lengths == [[n] * len(chain.models) for n in (24, 5, 7, 9)], lengths
    layers = [layer for kv in texts[2] for layer in kv.layers]
    return out + [tensor for layer in layers for tensor in layer.parts(9).values()]


def compare(split: Callable[[Part], Mixtral], whole: Mixtral, bits: int = 16, most: int = 4) -> None:
    """Compare all splits of a model, whose parts `split` makes, with the whole: bit for bit."""
    expected = [tensor.clone() for tensor in work(Chain([whole]), whole.config.vocab, bits)]
    assert all(tensor.isfinite().all() for tensor in expected) and expected[0].std() > 0.1
    models: dict[Part, Mixtral] = {}
    for layers in splits(whole.config.layers, most):
        parts = in_order(whole.config, layers)
        for part in parts:
            if part not in models:
                models[part] = split(part)
        found = work(Chain([models[part] for part in parts]), whole.config.vocab, bits)
        for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(mine, theirs), (layers, place)
