"""Find and read the tokenizer's file of a checkpoint: `tokenizer.model`, or else `tokenizer.json`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from tokenizer.errors import TokenizerError, quoted

NAME, JSON = "tokenizer.model", "tokenizer.json"
MOST = {JSON: 64 << 20}  # bytes. Such files have a few megabytes
MAX_BYTES = 16 << 20  # Mixtral's have half a megabyte. The limit keeps us from reading a file of weights


def find_model(path: str | PathLike[str]) -> Path:
    """Return the tokenizer file that `path` means: the file itself, or the one in a checkpoint folder.

    In a folder this is `tokenizer.model`, or else the only `tokenizer.model.*`, or else `tokenizer.json`.
    Mistral also uses names such as `tokenizer.model.v3`.

    Raises `TokenizerError` if the folder holds none, or several without a `tokenizer.model`, or cannot be
    searched.
    """
    try:
        return _find(Path(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or a TokenizerError
        if isinstance(error, TokenizerError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise TokenizerError(
            f"{quoted(str(path))}: cannot be searched ({reason}); check the path and its permissions"
        ) from None


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise TokenizerError(f"{path}: no such file or folder; give a checkpoint folder or its {NAME}")
    if (path / NAME).is_file():
        return path / NAME
    found = sorted(p for p in path.glob(NAME + ".*") if p.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(quoted(p.name) for p in found[:4]) + (", ..." if len(found) > 4 else "")
        raise TokenizerError(
            f"{path}: holds {len(found)} tokenizers ({names}); give the path of one, or name it {NAME}"
        )
    if (path / JSON).is_file():
        return path / JSON
    raise TokenizerError(f"{path}: holds no {NAME} and no {JSON}; copy one from the original checkpoint")


def read_model(file: Path) -> bytes:
    """Read a whole tokenizer file.

    Raises `TokenizerError` if it cannot be read, is empty or far too large, or is a Git LFS pointer.
    """
    try:
        size, most = file.stat().st_size, MOST.get(file.name, MAX_BYTES)
        if size > most:
            raise TokenizerError(
                f"{file}: {size} bytes is too large for a tokenizer (limit {most}); "
                "give the path of tokenizer.model"
            )
        data = file.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"{file}: cannot be read ({error.strerror}); check the file and its permissions"
        ) from None
    if not data:
        raise TokenizerError(f"{file}: is empty (0 bytes); download it again")
    if data.startswith(b"version https://git-lfs"):
        raise TokenizerError(
            f"{file}: is a Git LFS pointer ({len(data)} bytes), not the file; run `git lfs pull`"
        )
    return data
