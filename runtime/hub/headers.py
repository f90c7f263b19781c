"""The headers of a model's weight files, read at the hub."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.checkpoint.safetensors import PREFIX, Header, parse_header
from runtime.hub.fetching import read
from runtime.hub.remote import Remote

FIRST = 1 << 16  # bytes that are read first of a file, and hold most headers
READERS = 8


def remote_headers(remote: Remote, files: list[str], folder: Path) -> dict[Path, Header]:
    """The headers of weight files at the hub, by the paths that the files would have in `folder`."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="hub") as pool:
        headers = pool.map(lambda file: remote_header(remote, file, folder / file), files)
        return dict(zip((folder / file for file in files), headers, strict=True))


def remote_header(remote: Remote, file: str, path: Path) -> Header:
    """The header of one file. `path` names the file in messages."""
    first = read(remote, file, 0, FIRST)

    def rest(length: int) -> bytes:
        return first[PREFIX : PREFIX + length] + read(remote, file, len(first), PREFIX + length)

    return parse_header(path, first[:PREFIX], rest, remote.files[file].bytes)
