"""What a model's name means: a path, or a model at the hub."""

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:/(?P<file>[\w.-]+(?:/[\w.-]+)*\.gguf))?"
    r"(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubName:
    """A model at the hub, at a branch, tag or commit; a `file` of it if one is named."""

    repo: str
    revision: str = "main"
    file: str | None = None

    @staticmethod
    def parse(name: str | PathLike[str]) -> "HubName | None":
        """The model of this name; None if a file or folder has it, or if no model can.

        >>> HubName.parse("mistralai/Mixtral-8x7B-v0.1@refs/pr/3")
        HubName(repo='mistralai/Mixtral-8x7B-v0.1', revision='refs/pr/3', file=None)
        >>> HubName.parse("./org/name"), HubName.parse("models/mixtral/q4"), HubName.parse("mixtral")
        (None, None, None)
        """
        match = NAME.fullmatch(str(name))
        if match is None or ".." in str(name) or exists(Path(name)):
            return None
        return HubName(match["repo"], match["revision"] or "main", match["file"])

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        revision = f"@{self.revision}" if self.revision != "main" else ""
        return f"{self.repo}{file}{revision}"


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def title(name: str | PathLike[str]) -> str:
    """What to call a model in messages: the last part of a path, or all of a name at the hub.

    >>> title("path/to/some/mixtral-4-3g128"), title("mistralai/Mixtral-8x7B-v0.1")
    ('mixtral-4-3g128', 'mistralai/Mixtral-8x7B-v0.1')
    """
    hub = HubName.parse(name)
    return str(hub) if hub else Path(name).resolve().name
