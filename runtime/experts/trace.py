"""A record of what became of each expert that was needed or guessed: typed events, one line of JSON each.

The first line describes the model and the cache (`Header`), every other line is one event:

    {"format": "mixtral-trace", "version": 1, "layers": 32, "experts": 8, "experts_per_token": 2, ...}
    {"event": "routing", "step": 7, "layer": 0, "tokens": 1, "experts": [1, 6], "weights": [0.4, 0.6]}
    {"event": "hit", "step": 7, "layer": 0, "expert": 6}
    {"event": "miss", "step": 7, "layer": 0, "expert": 1, "evicted": 4}

A step is one forward, counted from 0 by the engine over all its sessions: one token when decoding, a chunk of
a prompt otherwise. In each layer of a step there is one `Routing`, and then a `Hit` or `Miss` for each of its
experts, in the order in which the slot table is asked: hits first, misses behind them, both in `Routing`'s
order. A guess that comes true is a `Miss` (the policy's accounts do not depend on guesses) and a `UsedGuess`.

Whoever may be traced has a `Recorder | None`, and does nothing but test it where it is None.
"""

import dataclasses
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, TextIO

from model.errors import quoted
from runtime.errors import MixtralError

FORMAT, VERSION = "mixtral-trace", 1


class TraceError(MixtralError):
    """A trace that cannot be written or read."""


@dataclass(frozen=True)
class Header:
    """What the events are about."""

    layers: int
    experts: int  # in each layer
    experts_per_token: int
    slots: tuple[int, ...]  # of each layer
    spares: int  # slots for guesses
    policy: str
    seed: int  # of the policy
    expert_bytes: int  # one expert's blob
    options: Mapping[str, Any] = field(default_factory=dict)  # whatever else was set, as JSON has it


@dataclass(frozen=True)
class Routing:
    """Which experts the layer needs, each once, in order of preference (ascending, if there is none).

    `weights`, if known: the gate's weight of each, summed over the tokens.
    """

    step: int
    layer: int
    tokens: int
    experts: tuple[int, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Ranking:
    """What the lookahead gate thought, `distance` layers before `layer`, that `layer` would need: experts,
    likeliest first. It need not be all; how far it goes is how many guesses can be studied."""

    step: int
    layer: int
    distance: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Hit:
    """A needed expert was in one of the layer's slots."""

    step: int
    layer: int
    expert: int


@dataclass(frozen=True)
class Miss:
    """A needed expert was not, and took the place of `evicted`, or an empty slot."""

    step: int
    layer: int
    expert: int
    evicted: int | None = None


@dataclass(frozen=True)
class Guess:
    """A copy to a spare slot begins: `distance` layers before, the lookahead gate ranked the expert as number
    `rank`, from 0."""

    step: int
    layer: int
    expert: int
    distance: int
    rank: int


@dataclass(frozen=True)
class UsedGuess:
    """The missing expert was in a spare slot, or on its way there."""

    step: int
    layer: int
    expert: int


@dataclass(frozen=True)
class WastedGuess:
    """A guess was dropped unused, after `bytes` had been copied for it."""

    step: int
    layer: int
    expert: int
    bytes: int


@dataclass(frozen=True)
class Copy:
    """An expert's bytes crossed the link. `kind` is what the copy began as."""

    step: int
    layer: int
    expert: int
    kind: str
    bytes: int
    seconds: float  # that the link was busy with it


@dataclass(frozen=True)
class Stall:
    """Computing waited for an expert's copy."""

    step: int
    layer: int
    expert: int
    seconds: float


Event = Routing | Ranking | Hit | Miss | Guess | UsedGuess | WastedGuess | Copy | Stall

NAMES: dict[type, str] = {
    Routing: "routing",
    Ranking: "ranking",
    Hit: "hit",
    Miss: "miss",
    Guess: "guess",
    UsedGuess: "used",
    WastedGuess: "wasted",
    Copy: "copy",
    Stall: "stall",
}


class Recorder(Protocol):
    """Takes events, from any thread."""

    def add(self, event: Event) -> None: ...


class TraceWriter:
    """Writes events to a file as they come.

    All of a step is in the file once the next one begins, so a process that dies loses one step at most. A
    file that takes no more (a full disk) ends the recording, not the request: `close` raises what happened.
    """

    def __init__(self, file: TextIO, header: Header) -> None:
        self.file: TextIO | None = file
        self.name = str(getattr(file, "name", "trace"))
        self.lock = threading.RLock()  # a finaliser may call `close` in the midst of `add`
        self.step = 0
        self.error: OSError | None = None
        file.write(json.dumps({"format": FORMAT, "version": VERSION} | dataclasses.asdict(header)) + "\n")
        file.flush()

    @staticmethod
    def open(path: str | PathLike[str], header: Header) -> "TraceWriter":
        """A new file, or an old one overwritten. Raises `TraceError` if that cannot be."""
        try:
            return TraceWriter(open(path, "w", encoding="utf-8"), header)
        except OSError as error:
            raise TraceError(f"{path}: {error.strerror}") from error
        except ValueError as error:  # a path with a NUL in it
            raise TraceError(f"{quoted(path)}: {error}") from error

    def add(self, event: Event) -> None:
        """An event behind `close`, from a copy that was still under way, is dropped."""
        line = json.dumps({"event": NAMES[type(event)]} | vars(event)) + "\n"
        with self.lock:
            if self.file is None or self.error:
                return
            file = self.file
            try:
                if event.step > self.step:
                    file.flush()
                    self.step = event.step
                file.write(line)
            except ValueError:
                assert file.closed  # by such a finaliser, just now
            except OSError as error:
                self.error = error

    def close(self) -> None:
        """Raises `TraceError` if not all could be written."""
        with self.lock:
            file, self.file = self.file, None
            if file is None:
                return
            try:
                file.close()
            except OSError as error:
                self.error = self.error or error
        if self.error:
            raise TraceError(
                f"{self.name}: {self.error.strerror}; the trace ends at step {self.step}"
            ) from self.error
