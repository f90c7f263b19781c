"""From logits to a token: pure functions of one row of logits, [V] float32 throughout.

Filters set the logits of excluded tokens to -inf. They are defined as in the literature (top-p: arXiv
1904.09751, min-p: arXiv 2407.01082, repetition penalty: arXiv 1909.05858), so settings carry over from other
runtimes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.errors import RequestError
from runtime.options import SamplingParams


class Sampled(NamedTuple):
    """A token that was sampled. Log-probabilities are those before any sampling option."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest ids, as many as `top_logprobs` asks for


def sample(
    logits: Tensor,
    params: SamplingParams,
    seen: Tensor | None,
    generator: torch.Generator | None,
    counts: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Sampled:
    """The next token.

    `seen` [V] bool marks the ids that already occurred, and `counts` [V] float32 says how often each was
    sampled. Only ids that `allowed` [V] bool marks can come, if it is given. `generator` is on the logits'
    device, and None at temperature 0. Waits for the device once, and twice if `params` ask for the likeliest.

    Raises `RequestError` if a logit is NaN, or if `params` leave no token: all are forbidden, or the numbers
    exceed float32's range.
    """
    logprobs = logits.log_softmax(-1)
    adjusted = adjust(logits, params, seen, counts)
    if allowed is not None:
        adjusted = adjusted.masked_fill(~allowed, -torch.inf)
    largest, token = adjusted.max(0)
    if params.temperature > 0:
        token = draw(keep(adjusted, params).softmax(-1), generator)
    numbers = [token.float(), logprobs.gather(0, token.view(1))[0], logprobs[0], largest]  # an id is exact
    sampled, logprob, first, most = torch.stack(numbers).tolist()
    if math.isnan(first):  # one NaN or +infinity among the logits makes all log-probabilities NaN
        raise RequestError("the model computed NaN; try --dtype float32, or check the checkpoint")
    if not math.isfinite(most):
        raise RequestError(
            f"no token can be sampled, the largest logit is {most}; "
            f"allow some in logit_bias, or take less extreme sampling options"
        )
    return Sampled(int(sampled), logprob, likeliest(logprobs, params.top_logprobs))


def likeliest(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The ids with the largest log-probabilities, largest first, but none that cannot come.

    >>> likeliest(torch.tensor([-2.0, -0.5, -torch.inf]), 3)
    ((1, -0.5), (0, -2.0))
    """
    if not count:
        return ()
    values, ids = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple((i, value) for i, value in pairs if value > -math.inf)


def adjust(
    logits: Tensor, params: SamplingParams, seen: Tensor | None, counts: Tensor | None = None
) -> Tensor:
    """The logits after penalties, bias and temperature."""
    if seen is not None and params.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, params.repetition_penalty)
    if counts is not None:
        logits = penalize_sampled(logits, counts, params.presence_penalty, params.frequency_penalty)
    if params.logit_bias:
        logits = add_bias(logits, params.logit_bias)
    return logits / params.temperature if params.temperature > 0 else logits


def keep(logits: Tensor, params: SamplingParams) -> Tensor:
    """Keep the logits that every filter of `params` keeps; set the others to -inf."""
    if 0 < params.top_k < len(logits):
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    return logits


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index with these probabilities.

    Of exponential clocks with these rates, each is the first to ring with its probability.
    `torch.multinomial` draws the same way, but waits for the device several times to check its arguments.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_(1, generator=generator)).argmax()


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of tokens already seen by `penalty`, and multiply negative ones by it.

    >>> penalize_repetition(torch.tensor([2.0, -2.0, 2.0]), torch.tensor([True, True, False]), 2.0).tolist()
    [1.0, -4.0, 2.0]
    """
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def penalize_sampled(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Take `presence` from the logit of each token that was sampled, and `frequency` for each time, as
    OpenAI's API defines them.

    >>> penalize_sampled(torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]), 0.5, 0.25).tolist()
    [0.0, -0.75, -1.0]
    """
    return logits - frequency * counts - presence * (counts > 0)


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    ids = torch.tensor(list(bias), device=logits.device)
    return logits.index_add(
        0, ids, torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    )


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and those equal to the smallest of them."""
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities add up to p or more.

    >>> probabilities = torch.tensor([0.5, 0.1, 0.4])
    >>> keep_top_p(probabilities.log(), 0.6).isfinite().tolist()
    [True, False, True]
    """
    ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
    reached = ordered.cumsum(-1) - ordered >= p  # the likelier ones already add up to p
    return logits.masked_fill(torch.empty_like(reached).scatter_(0, order, reached), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), -torch.inf)
