"""Stop strings in streamed text: nothing of one is ever shown, wherever token borders fall."""

from collections.abc import Sequence


class StopScanner:
    """Holds text back for as long as it may be the beginning of a stop string.

    The text ends before the stop string that is whole first, reading character by character; before the
    longest, if several end at that character. So the result does not depend on how the text is cut up.

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
        """Take more text; return what can be shown. Once a stop string is found, nothing more ever is."""
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
        """The text has ended: what was held back is no stop string after all."""
        held, self.held = self.held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and that is not all of `stop`.

    >>> overlap("xaba", "abac"), overlap("xyz", "abac")
    (3, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
