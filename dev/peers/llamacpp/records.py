"""Turns that have been taken, in a file of JSON lines, so that a run that was cut off goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import OptionError

Turn = tuple[int, int, str]  # round, requests at once, way


class Records:
    """Answers by turn. The file's first line has the settings that they depend on."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Read the file, or begin it. A last line that was cut off does not count.

        Raises `OptionError` if the file is of other settings or none of ours.
        """
        self.path, self.turns = path, dict[Turn, dict[str, Any]]()
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if not lines:
            self.rewrite([settings])
            return
        try:
            found, *turns = map(json.loads, lines)
            self.turns = {(turn.pop("round"), turn.pop("requests"), turn.pop("way")): turn for turn in turns}
            other = [f"{name} {found.get(name)}, not {value}" for name, value in settings.items()
                     if found.get(name) != value]  # fmt: skip
        except (ValueError, KeyError, AttributeError):
            raise OptionError(f"{path} is no file of turns; name another one by --turns") from None
        if other:
            raise OptionError(
                f"{path} has turns of {', '.join(other)}; remove it, or name another by --turns"
            )
        self.rewrite([settings, *(as_line(turn, answer) for turn, answer in self.turns.items())])

    def rewrite(self, lines: list[Mapping[str, Any]]) -> None:
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def add(self, turn: Turn, answer: Mapping[str, Any]) -> None:
        self.turns[turn] = dict(answer)
        with self.path.open("a") as file:
            file.write(json.dumps(as_line(turn, answer)) + "\n")


def as_line(turn: Turn, answer: Mapping[str, Any]) -> dict[str, Any]:
    number, requests, way = turn
    return {"round": number, "requests": requests, "way": way, **answer}
