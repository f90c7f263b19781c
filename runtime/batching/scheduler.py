"""Whose turn it is: which requests have a place, whose prompt is computed next, and who writes.

Plain Python, which knows nothing of models. A batch asks it for one turn after the other. A turn is a chunk
of one prompt, or one more token for all texts that are being written. If there is work of both kinds they
alternate, so a text waits for at most one chunk between two of its tokens.

Several turns may be under way at once. A text takes part in one of them, because its next token follows from
the last. So if there are no prompts, the texts take turns in as many groups as turns can be under way.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from runtime.errors import RequestError

Item = TypeVar("Item")


class QueueFull(RequestError):
    """There is neither a place nor room in the queue."""


class Scheduler(Generic[Item]):
    """Requests that wait for a place, whose prompts are being computed, and whose texts are being written.

    >>> left = {"long": 9, "short": 1}
    >>> scheduler = Scheduler(places=2, queue=1, left=left.get)
    >>> for name in ("long", "short", "late"):
    ...     scheduler.add(name)
    >>> scheduler.admit()
    ['long', 'short']
    >>> scheduler.next_turn(), scheduler.next_turn()  # the one with the least left, and the oldest
    (('short', []), ('long', []))
    >>> scheduler.add("one too many")
    Traceback (most recent call last):
    runtime.batching.scheduler.QueueFull: 2 requests are being served and 1 waits, as many as may; try again later
    """  # noqa: E501

    def __init__(self, places: int, queue: int, left: Callable[[Item], int], groups: int = 1) -> None:
        """`places` requests are served at once, and `queue` more may wait. `left` says how many tokens of an
        item's prompt are in no turn yet. Texts are written in up to so many `groups`."""
        self.places, self.queue, self.left, self.groups = places, queue, left, groups
        self.waiting: deque[Item] = deque()
        self.prompts: list[Item] = []  # the oldest first
        self.writing: list[Item] = []  # without those in a turn
        self.away: list[Item] = []  # texts in a turn that is under way
        self.prompt_turn = False  # the last turn was a prompt's
        self.oldest_turn = True  # the last prompt's turn was the oldest one's

    @property
    def served(self) -> int:
        """How many requests have a place."""
        return len(self.prompts) + len(self.writing) + len(self.away)

    @property
    def all(self) -> list[Item]:
        """Those that have a place."""
        return [*self.prompts, *self.writing, *self.away]

    def add(self, item: Item) -> None:
        """Let a request wait for a place. Raises `QueueFull` if there are too many already."""
        free = self.places - self.served
        if len(self.waiting) >= self.queue + free:
            raise full(self.served, len(self.waiting))
        self.waiting.append(item)

    def admit(self) -> list[Item]:
        """Give free places to those that have waited longest. Returns who has got one."""
        admitted = []
        while self.waiting and self.served < self.places:
            admitted.append(self.waiting[0])
            if admitted[-1] not in self.prompts:  # by a call that was interrupted
                self.prompts.append(admitted[-1])
            self.waiting.popleft()
        return admitted

    def remove(self, item: Item) -> None:
        """A request has ended or was given up, wherever it is."""
        for items in (self.waiting, self.prompts, self.writing, self.away):
            if item in items:
                items.remove(item)

    def begin_writing(self, item: Item) -> None:
        """A prompt has been computed. May be said twice."""
        if item in self.prompts:
            if item not in self.writing:
                self.writing.append(item)
            self.prompts.remove(item)

    def come_back(self, items: Iterable[Item]) -> None:
        """The turn of these texts is over."""
        for item in items:
            if item in self.away:
                if item not in self.writing:
                    self.writing.append(item)
                self.away.remove(item)

    def next_turn(self) -> tuple[Item | None, list[Item]]:
        """A prompt whose next chunk is to be computed, or texts that get one more token; neither if there is
        nothing to do before a turn under way is over."""
        due = [item for item in self.prompts if self.left(item)]
        self.prompt_turn = bool(due) and not (self.writing and self.prompt_turn)
        if self.prompt_turn:
            return self.next_prompt(due), []
        # With a prompt's chunk between any two turns, groups would wait for several chunks.
        size = len(self.writing) if due else -(-(len(self.writing) + len(self.away)) // self.groups)
        group = self.writing[:size]
        self.away += group  # first, so that an interrupt loses none
        del self.writing[:size]
        return None, group

    def next_prompt(self, due: Sequence[Item]) -> Item:
        """The prompt whose turn it is. Every second turn is that of the one with the least left, so a short
        prompt does not wait for long ones. The others are the oldest one's, so a long one does not wait for
        ever."""
        self.oldest_turn = not self.oldest_turn
        return due[0] if self.oldest_turn else min(due, key=self.left)


def full(served: int, waiting: int) -> QueueFull:
    are, wait = ("is", "waits") if served == 1 else ("are", "waits" if waiting == 1 else "wait")
    return QueueFull(
        f"{served} request{'s' * (served != 1)} {are} being served and {waiting} {wait}, as many as may; "
        "try again later"
    )
