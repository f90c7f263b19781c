"""A record of what became of each expert that was needed or guessed: typed events, one line of JSON each.

The first line describes the model and the cache (`Header`). Every other line is one event:

    {"format": "mixtral-trace", "version": 1, "layers": 32, "experts": 8, "experts_per_token": 2, ...}
    {"event": "routing", "step": 7, "layer": 0, "tokens": 1, "experts": [1, 6], "weights": [0.4, 0.6]}
    {"event": "hit", "step": 7, "layer": 0, "expert": 6}
    {"event": "miss", "step": 7, "layer": 0, "expert": 1, "evicted": 4}

In a trace, a step is one forward: a decoded token, or a chunk of a prompt. The engine counts them from 0 over
all its sessions. Each layer of a step has one `Routing`, then a `Hit` or `Miss` for each of its experts:
first the hits, then the misses, both in the order of `Routing`. Misses that the host computes come last. A
guess that comes true is a `Miss` and a `UsedGuess`, because the policy's accounts do not depend on guesses.
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
    """The model and the cache that the events are about."""

    layers: int
    experts: int  # in each layer
    experts_per_token: int
    slots: tuple[int, ...]  # of each layer
    spares: int  # slots for guesses
    policy: str
    seed: int  # of the policy
    expert_bytes: int  # one expert's blob
    berths: int = 0  # experts that host memory has room for; 0 if it has all of them
    spare_berths: int = 0  # of these, doubles that are left alone: see `runtime.experts.berths`
    in_berths: tuple[int, ...] = ()  # who was there at first, by berth: layer * experts + expert
    options: Mapping[str, Any] = field(default_factory=dict)  # other settings, and rates; as JSON


@dataclass(frozen=True)
class Routing:
    """Which experts the layer needs, each once, in the order in which it asks for them.

    `weights`, if known, holds each expert's routing weights, added up over the tokens.
    """

    step: int
    layer: int
    tokens: int
    experts: tuple[int, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Ranking:
    """Which experts the router `distance` layers before `layer` expected it to need, likeliest first. The
    ranking may be cut short. Its length limits how many guesses can be studied."""

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
    """A needed expert was in none of them. It took the slot of `evicted`, or an empty slot. `source` says
    where it was before: in host memory ("host"), or only in its file ("file").

    If the `source` is "compute", the host computed it from host memory. Then it took a slot for later tokens,
    or none if it was not `placed`.
    """

    step: int
    layer: int
    expert: int
    evicted: int | None = None
    source: str = "host"
    placed: bool = True


@dataclass(frozen=True)
class Guess:
    """A copy to a spare slot began. The router `distance` layers before `layer` had ranked the expert number
    `rank`, counted from 0."""

    step: int
    layer: int
    expert: int
    distance: int
    rank: int


@dataclass(frozen=True)
class UsedGuess:
    """A missing expert was in a spare slot, or on its way there."""

    step: int
    layer: int
    expert: int


@dataclass(frozen=True)
class WastedGuess:
    """A guess was dropped unused, after `bytes` of it had been copied."""

    step: int
    layer: int
    expert: int
    bytes: int


@dataclass(frozen=True)
class Copy:
    """An expert crossed the link. `kind` says what the copy began as: "demand", "guess" or "placed"."""

    step: int
    layer: int
    expert: int
    kind: str
    bytes: int
    seconds: float  # that the link was busy with it


@dataclass(frozen=True)
class Read:
    """An expert was read from its file to host memory."""

    step: int
    layer: int
    expert: int
    kind: str  # as for `Copy`, or "compute" if it was read for the host and got no slot
    bytes: int
    seconds: float  # that the disk was busy with it


@dataclass(frozen=True)
class WriteBack:
    """An expert that left its slot was copied to host memory, where it had no berth."""

    step: int
    layer: int
    expert: int
    bytes: int
    seconds: float  # that the link's other direction was busy with it


@dataclass(frozen=True)
class Drop:
    """An expert left host memory for another, and no slot has it. It is only in its file now."""

    step: int
    layer: int
    expert: int


@dataclass(frozen=True)
class Stall:
    """Computing waited for an expert's copy."""

    step: int
    layer: int
    expert: int
    seconds: float


Event = (
    Routing | Ranking | Hit | Miss | Guess | UsedGuess | WastedGuess | Copy | Read | WriteBack | Drop | Stall
)

NAMES: dict[type, str] = {
    Routing: "routing",
    Ranking: "ranking",
    Hit: "hit",
    Miss: "miss",
    Guess: "guess",
    UsedGuess: "used",
    WastedGuess: "wasted",
    Copy: "copy",
    Read: "read",
    WriteBack: "written back",
    Drop: "drop",
    Stall: "stall",
}


class Recorder(Protocol):
    """Takes events from any thread."""

    def add(self, event: Event) -> None: ...


class TraceWriter:
    """Writes events to a file as they come.

    A step is in the file when the next one begins, so a process that dies loses one step at most. A full disk
    ends the recording and not the request. `close` then raises what happened.
    """

    def __init__(self, file: TextIO, header: Header) -> None:
        self.file: TextIO | None = file
        self.name = str(getattr(file, "name", "trace"))
        self.lock = threading.RLock()  # a finalizer may call `close` in the middle of `add`
        self.step = 0
        self.error: OSError | None = None
        file.write(json.dumps({"format": FORMAT, "version": VERSION} | dataclasses.asdict(header)) + "\n")
        file.flush()

    @staticmethod
    def open(path: str | PathLike[str], header: Header) -> "TraceWriter":
        """Create the file or overwrite it. Raises `TraceError` if it cannot be opened."""
        try:
            return TraceWriter(open(path, "w", encoding="utf-8"), header)
        except OSError as error:
            raise TraceError(f"{path}: {error.strerror}") from error
        except ValueError as error:  # a path with a NUL in it
            raise TraceError(f"{quoted(path)}: {error}") from error

    def add(self, event: Event) -> None:
        """Write an event. After `close` it is dropped: a copy may still have been under way."""
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
                assert file.closed  # a finalizer closed it just now
            except OSError as error:
                self.error = error

    def close(self) -> None:
        """Close the file. Raises `TraceError` if not all events could be written."""
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
