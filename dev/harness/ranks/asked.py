"""What ranks are asked to write, and what one process writes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

FIGURES = re.compile(r"[\d.,]+( ?(?:[KMG]iB|bytes|ms|us|s)\b)?")
USUAL = re.compile(r"(loading|compiling|downloading).*: (done|.* of )|rank \d+ (on|to) ")  # progress, plans
NAMED = re.compile(r"^rank \d+: ")  # how the lines of all ranks but 0 begin
PROMPT = "> "  # of a conversation on a terminal


@dataclass(frozen=True)
class Asked:
    """A text, or a conversation in which `messages` are typed. `text` is all that comes to stdout then, from
    one process."""

    command: tuple[str, ...]
    text: str
    messages: tuple[str, ...] = ()

    def agrees(self, said: str) -> bool:
        """Whether what a rank has written is a beginning of what is right."""
        return self.text.startswith(said)

    def shown(self, screen: str) -> str:
        """What a terminal shows of the answers: without what was typed, and what asks for it.

        >>> Asked((), "", ("Hi", "Why?")).shown("> Hi\\r\\nHello.\\r\\n> Why?\\r\\nBec")
        'Hello.Bec'
        """
        screen = "\n" + re.sub(r"\x1b\[\?\d+[hl]\r?", "", screen).replace("\r\n", "\n")
        for message in self.messages:
            screen = screen.replace(f"\n{PROMPT}{message}\n", "", 1)
        return screen.rstrip("\n").removesuffix("\n" + PROMPT)


class Ordinary:
    """The lines that ranks print which nothing befalls. Their figures may differ."""

    def __init__(self) -> None:
        self.known: set[str] = {PROMPT.strip()}

    def learn(self, err: str) -> None:
        self.known |= {kind(NAMED.sub("", line)) for line in err.splitlines()}

    def others(self, err: str) -> list[str]:
        """The lines that are none of these, without a prompt in front or the rank that says it."""
        lines = [NAMED.sub("", re.sub(f"^({PROMPT})+", "", line)) for line in err.splitlines()]
        return [line for line in lines if line.strip() and not self.knows(line)]

    def knows(self, line: str) -> bool:
        return kind(line) in self.known or USUAL.match(line) is not None


def kind(line: str) -> str:
    """A line without its figures, by which two of the same kind are known.

    >>> kind("arena 24.0 MiB of 3,000 bytes") == kind("arena 2 KiB of 1 bytes")
    True
    """
    return FIGURES.sub("#", line).strip()


def kinds_of(lines: Sequence[str]) -> dict[str, int]:
    """How many lines there are of each kind, the most frequent first. A kind is shown by its first line."""
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    for line in lines:
        shown = first.setdefault(kind(line), line)
        counts[shown] = counts.get(shown, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
