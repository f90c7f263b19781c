"""Stop strings in streamed text. No part of one is ever shown, wherever tokens begin and end."""

from collections.abc import Sequence


class StopScanner:
    """Holds text back while it may be the beginning of a stop string.

    The text ends before the stop string whose last character comes first, and before the longest of them if
    several end there. So the result does not depend on how the text is cut into pieces.

    >>> scanner = StopScanner(["END"])
    >>> scanner.push("the E"), scanner.push("N"), scanner.push("T, the EN"), scanner.push("D of it")
    ('the ', '', 'ENT, the ', '')
    >>> scanner.found
    True
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take more text; return what can be shown. After a stop string, that is nothing."""
        if self.found or not self.stops:
            return "" if self.found else text
        text = self.held + text
        ends = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)[1]]
        keep = max(overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text held back. Call it at the end, when no stop string can be completed any more."""
        held, self.held = self.held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it.

    >>> overlap("xaba", "abac"), overlap("xyz", "abac")
    (3, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
