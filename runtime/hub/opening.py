"""A model's name to its folder, or to its headers alone."""

from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

from model.checkpoint import Checkpoint, open_checkpoint
from model.checkpoint.load import checkpoint_of
from model.checkpoint.safetensors import PREFIX, Header, parse_header
from runtime.hub.cache import Bar, bring_small, cached, has_tokenizer, has_weights, snapshot
from runtime.hub.errors import explained
from runtime.hub.names import HubName
from runtime.hub.needed import weights
from runtime.hub.remote import Remote

FIRST = 1 << 16  # bytes that are read first of a file, and hold most headers
READERS = 8


def find_folder(name: str | PathLike[str], progress: Bar | None = None) -> Path:
    """The folder of a model: the path itself, or for a name at the hub the folder in the Hugging Face cache,
    to which what is missing is downloaded.

    `progress` is as for `Engine.load`. Raises `LoadError` if the model cannot be had, and `ModelError` if it
    is none that is read here.
    """
    hub = HubName.parse(name)
    if hub is None:
        return Path(name)
    with explained(hub):
        return snapshot(hub, progress)


def find_settings(name: str | PathLike[str]) -> Path:
    """Like `find_folder`, but what is missing of the weights stays away: for tokenizers."""
    hub = HubName.parse(name)
    if hub is None:
        return Path(name)
    with explained(hub):
        folder = cached(hub)
        return folder if folder and has_tokenizer(folder) else bring_small(Remote.find(hub))


def open_headers(name: str | PathLike[str]) -> Checkpoint:
    """The checkpoint of this name, to plan with. At the hub, only configuration and headers are read, so its
    files need not exist. Raises as `find_folder` and `open_checkpoint` do."""
    hub = HubName.parse(name)
    if hub is None:
        return open_checkpoint(Path(name))
    with explained(hub):
        folder = cached(hub)
        if folder and has_weights(folder):
            return open_checkpoint(folder)
        remote = Remote.find(hub)
        folder = bring_small(remote)
        return checkpoint_of(folder, remote_headers(remote, weights(hub, remote.files, folder), folder))


def remote_headers(remote: Remote, files: list[str], folder: Path) -> dict[Path, Header]:
    """The headers of weight files at the hub, by the paths that the files would have in `folder`."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="hub") as pool:
        headers = pool.map(lambda file: remote_header(remote, file, folder / file), files)
        return dict(zip((folder / file for file in files), headers, strict=True))


def remote_header(remote: Remote, file: str, path: Path) -> Header:
    """The header of one file. `path` names the file in messages."""
    first = remote.read(file, 0, FIRST)

    def read(length: int) -> bytes:
        return first[PREFIX : PREFIX + length] + remote.read(file, max(len(first), PREFIX), PREFIX + length)

    return parse_header(path, first[:PREFIX], read, remote.files[file].bytes)
