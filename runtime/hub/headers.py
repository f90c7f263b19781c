"""The headers of a model's weight files, read at the hub."""

from collections.abc import Callable
from pathlib import Path

from model.checkpoint.safetensors import PREFIX, Header, parse_header
from runtime.hub.at_once import at_once
from runtime.hub.fetching import read
from runtime.hub.remote import Remote

FIRST = 1 << 16  # bytes that are read first of a file, and hold most headers
READERS = 8


def remote_headers(remote: Remote, files: list[str], folder: Path) -> dict[Path, Header]:
    """The headers of weight files at the hub, by the paths that the files would have in `folder`."""

    def header(file: str, go_on: Callable[[], None]) -> Header:
        return remote_header(remote, file, folder / file, go_on)

    return dict(zip((folder / file for file in files), at_once(header, files, READERS), strict=True))


def remote_header(remote: Remote, file: str, path: Path, go_on: Callable[[], None]) -> Header:
    """The header of one file. `path` names the file in messages. `go_on` may raise an error to end this."""
    first = read(remote, file, 0, FIRST, go_on)

    def rest(length: int) -> bytes:
        return first[PREFIX : PREFIX + length] + read(remote, file, len(first), PREFIX + length, go_on)

    return parse_header(path, first[:PREFIX], rest, remote.files[file].bytes)
