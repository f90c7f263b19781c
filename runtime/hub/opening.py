"""A model's name to its folder, or to its headers alone."""

from os import PathLike
from pathlib import Path

from model.checkpoint import Checkpoint, open_checkpoint
from model.checkpoint.foreign import CONVERT
from model.checkpoint.load import checkpoint_of
from model.errors import ModelError
from runtime.hub.cache import Bar, Judge, bring_small, cached, has_tokenizer, has_weights, offline, snapshot
from runtime.hub.errors import explained
from runtime.hub.headers import remote_headers
from runtime.hub.names import HubName
from runtime.hub.needed import weights
from runtime.hub.remote import Remote


def find_folder(name: str | PathLike[str], progress: Bar | None = None, judge: Judge | None = None) -> Path:
    """The folder of a model: the path itself, or for a name at the hub the folder in the Hugging Face cache,
    to which what is missing is downloaded.

    `progress` is as for `Engine.load`. `judge` is called with the checkpoint before weights are downloaded,
    if they are. Raises `LoadError` if the model cannot be had, `ModelError` if it is none that is read here,
    and what `judge` does.
    """
    hub = HubName.parse(name)
    if hub is None:
        return Path(name)
    check_kind(hub)
    with explained(hub):
        return snapshot(hub, progress, judge)


def find_settings(name: str | PathLike[str]) -> Path:
    """Like `find_folder`, but what is missing of the weights stays away: for tokenizers."""
    hub = HubName.parse(name)
    if hub is None:
        return Path(name)
    with explained(hub):
        folder = cached(hub)
        if folder and has_tokenizer(folder) and (has_weights(folder) or offline()):
            return folder  # weights come last, so all else is there
        return bring_small(Remote.find(hub))


def open_headers(name: str | PathLike[str]) -> Checkpoint:
    """The checkpoint of this name, to plan with. At the hub, only configuration and headers are read, so its
    files need not exist. Raises as `find_folder` and `open_checkpoint` do."""
    hub = HubName.parse(name)
    if hub is None:
        return open_checkpoint(Path(name))
    check_kind(hub)
    with explained(hub):
        folder = cached(hub)
        if folder and has_weights(folder):
            return open_checkpoint(folder)
        remote = Remote.find(hub)
        folder = bring_small(remote)
        return checkpoint_of(folder, remote_headers(remote, weights(hub, remote.files, folder), folder))


def check_kind(name: HubName) -> None:
    """Raises `ModelError` if this names a file, which is in GGUF."""
    if name.file is not None:
        raise ModelError(f"{name}: a GGUF file; {CONVERT.format(name)}")
