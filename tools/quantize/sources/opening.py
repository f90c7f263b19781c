"""Tells which kind of model there is, and opens it."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from model.checkpoint import foreign
from model.checkpoint.files import check_folder, weight_files
from model.checkpoint.safetensors import read_header
from model.errors import ModelError
from runtime.hub.cache import Bar, cached, has_weights
from runtime.hub.errors import explained
from runtime.hub.names import HubName
from runtime.hub.remote import Remote
from tools.quantize.journal import begun_at
from tools.quantize.sources.folder import open_folder
from tools.quantize.sources.gguf import open_gguf
from tools.quantize.sources.gguf_files import has_gguf, is_gguf
from tools.quantize.sources.hqq import is_hqq, open_hqq
from tools.quantize.sources.hub import download_gguf, files_at_hub, source_name
from tools.quantize.sources.offloading import is_offloading, open_offloading
from tools.quantize.sources.source import ModelFiles, Source


def open_model(name: str, out: Path, progress: Bar | None = None) -> Source:
    """Open the model of this name, a path or one at the hub, to make the output `out`.

    At the hub, weights in safetensors come when they are needed, unless the Hugging Face cache has them all.
    `progress` is as for `Engine.load`. Raises `ModelError` if the model cannot be quantized, and `LoadError`
    if it cannot be had.
    """
    hub = HubName.parse(name)
    if hub is None:
        return open_path(Path(name))
    with explained(hub):
        commit, folder = begun_at(out, str(hub)), cached(hub)
        if folder and has_weights(folder) and commit is None:
            return open_source(replace(files_in(folder), name=source_name(hub)))
        if folder and hub.file and has_gguf(folder / hub.file):
            return open_gguf(folder / hub.file)
        remote = Remote.find(hub, commit)
        if hub.file or is_only_gguf(remote.files):
            return open_gguf(download_gguf(remote, progress))
        return open_source(files_at_hub(remote, out, progress))


def is_only_gguf(names: Collection[str]) -> bool:
    """Whether files of these names have weights in GGUF, and none in safetensors."""
    return not foreign.has_safetensors(names) and any(name.lower().endswith(foreign.GGUF) for name in names)


def open_path(path: Path) -> Source:
    """Open the model in a folder or a file. Raises `ModelError` if it cannot be quantized."""
    try:
        return open_gguf(path) if is_gguf(path) else open_source(files_in(path))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


def files_in(folder: Path) -> ModelFiles:
    """The files of a folder of safetensors files, with their headers read."""
    check_folder(folder)
    foreign.check_files(folder)
    paths = weight_files(folder)
    return ModelFiles.of_folder(folder, paths, {path: read_header(path) for path in paths})


def open_source(files: ModelFiles) -> Source:
    """Open a model whose weights are safetensors files. Only their headers need to be there."""
    if is_offloading(files):
        return open_offloading(files)
    return open_hqq(files) if is_hqq(files) else open_folder(files)
