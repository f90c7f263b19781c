"""Tells which kind of model there is, and opens it."""

from pathlib import Path

from model.checkpoint import foreign
from model.checkpoint.files import check_folder, weight_files
from model.checkpoint.safetensors import read_header
from model.errors import ModelError
from tools.quantize.sources.folder import open_folder
from tools.quantize.sources.gguf import open_gguf
from tools.quantize.sources.gguf_files import is_gguf
from tools.quantize.sources.offloading import is_offloading, open_offloading
from tools.quantize.sources.source import ModelFiles, Source


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
    return open_offloading(files) if is_offloading(files) else open_folder(files)
