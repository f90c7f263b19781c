"""A text as it is written, token by token: all that a request has beside the KV cache.

A session, and a batch of many requests, hand it the logits of each forward. It samples, and says what became
of the text.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from runtime.options import SamplingParams
from runtime.sampler import sample
from runtime.stop import StopScanner
from tokenizer import StreamDecoder

Finish = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    The tokens' texts, joined, are the answer. A single text can be empty, because half a character or the
    possible start of a stop string is held back. `logprob` is the token's log-probability before any sampling
    option, and `top` has the likeliest ids with theirs, if `SamplingParams.top_logprobs` asks for some. The
    last token's `finish` tells why the text ends: the model ended it, it reached a stop string or
    `max_new_tokens`, or the context is full.
    """

    id: int
    text: str
    logprob: float
    finish: Finish | None = None
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What a text has to obey."""

    def mask(self) -> Tensor:
        """Which tokens may come next: [V] bool, on the CPU."""
        ...

    def accept(self, token: int) -> None:
        """This one came."""
        ...


class Answer:
    """One text being written."""

    def __init__(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        decoder: StreamDecoder,
        room: int,
        ends: Collection[int],
        constraint: Constraint | None = None,
    ) -> None:
        """`ids` are the prompt's, and `decoder` continues its text. The context has `room` for so many new
        tokens. The text ends at `ends`, unless `params` ignore them."""
        self.ids, self.params, self.decoder, self.constraint = ids, params, decoder, constraint
        self.limit = min(params.max_new_tokens, room)
        self.ends = () if params.ignore_eos else ends
        self.scanner = StopScanner(params.stop)
        self.made = 0
        self.generator: torch.Generator | None = None
        self.seen: Tensor | None = None  # [V] bool: ids of the prompt and the text so far
        self.counts: Tensor | None = None  # [V] float32: how often each id was sampled

    def take(self, logits: Tensor) -> Token:  # [V] float32
        """Sample the next token. Raises `RequestError` as `sample` does. Call it inside
        `ModelRunner.working`."""
        if not self.made:
            self.begin(logits)
        allowed = None if self.constraint is None else self.constraint.mask().to(logits.device)
        sampled = sample(logits, self.params, self.seen, self.generator, self.counts, allowed)
        self.made += 1
        self.note(sampled.id)
        text, finish = self.read(sampled.id)
        return Token(sampled.id, text, sampled.logprob, finish, sampled.top)

    def begin(self, logits: Tensor) -> None:
        """Make what lives on the logits' device."""
        self.generator = new_generator(self.params, logits.device)
        if self.params.repetition_penalty != 1:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            self.seen[list(self.ids)] = True
        if self.params.presence_penalty or self.params.frequency_penalty:
            self.counts = torch.zeros_like(logits)

    def note(self, token: int) -> None:
        """Remember a token for what comes after it."""
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.constraint is not None and token not in self.ends:
            self.constraint.accept(token)

    def read(self, token: int) -> tuple[str, Finish | None]:
        """The text that is certain with this token, and why it ends the whole, if it does."""
        if token in self.ends:
            return self.rest(), "eos"
        text = self.scanner.push(self.decoder.push(token))
        if self.scanner.found:
            return text, "stop"
        if self.made < self.limit:
            return text, None
        return text + self.rest(), "length" if self.made == self.params.max_new_tokens else "context"

    def rest(self) -> str:
        """What was held back, now that nothing follows."""
        return self.scanner.push(self.decoder.flush()) + self.scanner.flush()


def new_generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    """The request's own random generator, from which nothing else draws; None if nothing is random."""
    if params.temperature == 0:
        return None
    generator = torch.Generator(device)
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator
