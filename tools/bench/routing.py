"""Routing that is made up, so that a model of random weights uses its experts as a trained one does, or as
badly as can be.

A random model's own routing says nothing of a trained one's, and what an expert cache is worth depends on
nothing so much as on how often the next token chooses the experts of the last. The Mixtral paper (arXiv
2401.04088, section 5) measured that at three depths; `synthetic` gives traces that repeat as often.

A trace is a choice for every token and layer: [P, L, A] int64, the A experts of a choice all different, the
first choice first. Everything here is the same on every machine for the same seed. `forced.py` makes a model
follow a trace.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.errors import OptionError
from tools.trace.replay import replay

# The paper's layers 0, 15 and 31 of 32, as depths, and the means of what it found in different texts: how
# many tokens have the same first choice as the token before, and how many a choice in common with it.
DEPTHS = (0.0, 15 / 31, 1.0)
FIRST = (0.14, 0.28, 0.22)
OVERLAP = (0.47, 0.645, 0.565)
PAPER = 8, 2  # experts, and experts of a token

# Of the experts that a token needs, how many are among the first A that the lookahead gate ranked one or two
# layers before: measured on the demo checkpoint (docs/benchmarks.md).
RECALL = {1: 0.837, 2: 0.731}

Maker = Callable[..., Tensor]  # (layers, experts, per_token, tokens, seed=0) -> [P, L, A] int64


def uniform(layers: int, experts: int, per_token: int, tokens: int, seed: int = 0) -> Tensor:
    """[P, L, A] int64: every choice as likely as any other, whatever was chosen before."""
    check(experts, per_token, least=1)
    keys = torch.rand(tokens, layers, experts, generator=torch.Generator().manual_seed(seed))
    return keys.argsort(dim=-1, stable=True)[..., :per_token].contiguous()


def synthetic(layers: int, experts: int, per_token: int, tokens: int, seed: int = 0) -> Tensor:
    """[P, L, A] int64: each layer a Markov chain whose choices repeat as the paper's do at its depth.

    Of 8 experts and 2 of them for a token, that is; with other numbers the same share of tokens keeps an
    expert on purpose, and chance does what it does. Raises `OptionError` for one expert a token, where the
    paper has nothing to say.
    """
    check(experts, per_token, least=2)
    steps = torch.tensor([mixture(layer / max(layers - 1, 1)) for layer in range(layers)])  # [L, 3]
    generator = torch.Generator().manual_seed(seed)
    dice = torch.rand(tokens, layers, generator=generator)
    keys = torch.rand(tokens, layers, experts, generator=generator)
    keeps = dice >= steps[:, 0]  # [P, L]: the last token's first choice is chosen again,
    moves = dice >= steps[:, 0] + steps[:, 1]  # [P, L]: but not as the first
    keeps[0] = moves[0] = False
    trace = torch.empty(tokens, layers, per_token, dtype=torch.int64)
    for t in range(tokens):
        if t:
            first = trace[t - 1, :, :1]  # [L, 1]
            keys[t].scatter_(1, first, torch.where(keeps[t, :, None], -1.0, keys[t].gather(1, first)))
        choice = keys[t].argsort(dim=-1, stable=True)[:, :per_token]  # [L, A], what is kept first
        swapped = torch.cat([choice[:, :2].flip(1), choice[:, 2:]], dim=1)
        trace[t] = torch.where(moves[t, :, None], swapped, choice)
    return trace


def check(experts: int, per_token: int, least: int) -> None:
    if not least <= per_token <= experts:
        raise OptionError(
            f"this routing is for models whose tokens choose from {least} to all of their {experts} experts, "
            f"not {per_token}"
        )


def mixture(depth: float) -> tuple[float, float, float]:
    """How likely a token is to choose afresh, to keep the last token's first choice as its first, and to
    keep it as its second, so that the paper's shares come about at `depth` from 0 to 1.

    A fresh choice of A of E has nothing in common with the last with probability d = C(E - A, A) / C(E, A),
    and the same first choice with 1 / E. So overlap = 1 - fresh * d, and first = kept + fresh / E:

    >>> [round(p, 3) for p in mixture(15 / 31)]
    [0.663, 0.197, 0.14]

    At depth 0 that would leave less than nothing for the third; then the first choices are given their due:

    >>> [round(p, 3) for p in mixture(0)]
    [0.983, 0.017, 0.0]
    """
    E, A = PAPER
    first, overlap = interpolate(FIRST, depth), interpolate(OVERLAP, depth)
    fresh = (1 - overlap) * math.comb(E, A) / math.comb(E - A, A)
    kept = first - fresh / E
    if fresh + kept > 1:
        kept = (first - 1 / E) / (1 - 1 / E)
        fresh = 1 - kept
    return fresh, kept, max(1 - fresh - kept, 0.0)


def interpolate(values: Sequence[float], depth: float) -> float:
    """Along straight lines between the paper's depths.

    >>> interpolate(FIRST, 0), round(interpolate(FIRST, 15 / 62), 3), interpolate(FIRST, 1)
    (0.14, 0.21, 0.22)
    """
    i = 0 if depth < DEPTHS[1] else 1
    part = (depth - DEPTHS[i]) / (DEPTHS[i + 1] - DEPTHS[i])
    return values[i] + part * (values[i + 1] - values[i])


def guesses(trace: Tensor, experts: int, distance: int, recall: float | None = None, seed: int = 0) -> Tensor:
    """[P, L, E] int64: all experts as a lookahead gate might have ranked them for layer l, `distance` layers
    before it, likeliest first. (For the first `distance` layers nobody does.)

    Each expert that is needed is among the first A with probability `recall`, the demo's for the distance if
    not given, and then before those that are not needed: the demo's gate ranks them so. One that is missed
    may be anywhere behind. (Where more than half of the experts are needed, some cannot be missed.)
    """
    recall = RECALL[distance] if recall is None else recall
    P, L, A = trace.shape
    generator = torch.Generator().manual_seed((distance << 32) + seed)
    found = torch.rand(trace.shape, generator=generator) < recall
    classes = torch.ones(P, L, experts).scatter_(-1, trace, torch.where(found, 0.0, 2.0))
    keys = classes + torch.rand(P, L, experts, generator=generator)
    ranking = keys.argsort(dim=-1, stable=True)
    rest = ranking[..., A:]
    shuffled = torch.rand(rest.shape, generator=generator).argsort(dim=-1, stable=True)
    return torch.cat([ranking[..., :A], rest.gather(-1, shuffled)], dim=-1)


def repetition(trace: Tensor) -> dict[str, list[float]]:
    """By layer: the share of tokens with the same first choice as the token before, and of those with a
    choice in common with it.

    >>> repetition(torch.tensor([[[0, 1]], [[0, 2]], [[3, 0]], [[1, 2]]]))
    {'first': [0.3333333333333333], 'overlap': [0.6666666666666666]}
    """
    before, after = trace[:-1], trace[1:]  # [P - 1, L, A]
    same = before[..., 0] == after[..., 0]
    common = (before[..., None] == after[..., None, :]).flatten(-2).any(-1)
    return {
        "first": same.double().mean(0).tolist(),
        "overlap": common.double().mean(0).tolist(),
    }


def hit_ratio(trace: Tensor, slots: int, policy: str = "lru") -> float:
    """The share of needed experts that a cache with so many slots in every layer would have had."""
    layers = [[sorted(choice) for choice in layer] for layer in trace.transpose(0, 1).tolist()]
    accesses = [
        access.hit
        for layer, needs in enumerate(layers)
        for step in replay(needs, slots, policy, layer=layer)
        for access in step
    ]
    return sum(accesses) / len(accesses)


def describe(trace: Tensor, slots: Sequence[int] = (2, 3, 4)) -> dict[str, Any]:
    """What a report should say of a trace: both shares, over all layers, and LRU's hits by slots."""
    shares = {name: sum(values) / len(values) for name, values in repetition(trace).items()}
    hits = {str(count): hit_ratio(trace, count) for count in slots}
    return {
        "tokens": len(trace),
        "same_first_choice": shares["first"],
        "a_choice_in_common": shares["overlap"],
        "lru_hit_ratio_by_slots": hits,
    }


MAKERS: dict[str, Maker] = {"uniform": uniform, "synthetic": synthetic}
