"""Copies that have been ordered: what they move, what they wait for, and how far they have come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from runtime.errors import RequestError


class Source(Protocol):
    """What a copy reads: a tensor, or a part of a file."""

    def numel(self) -> int: ...

    def __getitem__(self, part: slice) -> "Source":
        """A part in bytes. It may end earlier, but is not empty."""
        ...


class TransferError(RequestError):
    """An expert did not arrive. The request that needed it fails, and the next request copies it again."""


class ReadError(TransferError):
    """An expert could not be read from its file."""


@dataclass(eq=False)
class Ticket:
    """A copy of `source` to `target` [bytes] uint8, and how far it has come."""

    source: Any  # a `Source`
    target: Tensor
    demand: bool  # the expert is needed; False while it is only guessed
    free: Any = None  # the mark after the target's last use
    label: Any = None  # the caller's own
    moved: int = 0  # bytes
    marks: list[tuple[int, Any]] = field(default_factory=list)  # (bytes moved by then, the link's mark)
    seconds: float = 0.0  # that the link took
    error: BaseException | None = None
    cancelled: bool = False
    settled: bool = False  # no byte of it will be moved any more
    era: int = 0  # `cancel_all` begins a new era, and drops the copies of older ones
    after: Sequence["Ticket"] = ()  # copies that have to be settled before this one begins
    feeder: "Ticket | None" = None  # the copy that fills the source
    wakes: list[Callable[[], object]] = field(default_factory=list)  # called when dependent copies may go on

    @property
    def complete(self) -> bool:
        return self.moved == self.source.numel()

    def mark(self, count: int) -> Any:
        """The link's mark after the first `count` bytes, which have been moved."""
        return next(mark for moved, mark in self.marks if moved >= count)

    def may_begin(self) -> bool:
        """Whether nothing keeps the next byte from being moved, or the copy from failing."""
        if any(not other.settled for other in self.after):
            return False
        feeder = self.feeder
        return feeder is None or feeder.moved > self.moved or feeder.settled

    def fed(self) -> int:
        """How many bytes of the source are there. Raises the error for which the next ones will not come."""
        feeder = self.feeder
        if feeder is None:
            return int(self.source.numel())
        if feeder.moved <= self.moved:
            raise feeder.error or TransferError("an expert was given up before it arrived; try again")
        return feeder.moved

    def finish(self) -> None:
        """Note that no byte will be moved any more."""
        self.settled = True
        self.after, self.feeder = (), None  # otherwise each copy would keep all before it
        self.pass_on()

    def pass_on(self) -> None:
        """Have the engines look again whose copies wait for this one."""
        for wake in tuple(self.wakes):
            wake()


def failed(error: BaseException, what: str) -> TransferError:
    """The error of a thread that needs a copy that failed. Those that say all are passed on as they are.

    >>> failed(OSError("no such bus"), "an expert could not be copied")
    TransferError('an expert could not be copied (no such bus); try again')
    >>> failed(ReadError("model.safetensors: Input/output error; try again"), "an expert could not be copied")
    TransferError('model.safetensors: Input/output error; try again')
    """
    if isinstance(error, TransferError):
        return TransferError(str(error))
    return TransferError(f"{what} ({describe(error)}); try again")


def describe(error: BaseException) -> str:
    """An error in one line, or its type if it has no message.

    >>> describe(OSError("no\\n  such bus")), describe(ValueError())
    ('no such bus', 'ValueError')
    """
    return " ".join(str(error).split()) or type(error).__name__
