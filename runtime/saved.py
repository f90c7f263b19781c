"""Conversations in files: what a session holds, so that another process goes on with the same bits.

A file is a safetensors file. Its metadata name the model and hold the messages. Its tensors are

    ids             [T] int64, the tokens whose keys and values follow
    layers.0.keys   and all else that a KV cache stores of T tokens: see `KVCache.parts`. Over ranks, a file
                    has all ranks' layers
    sha256          [32] uint8, the SHA-256 of all bytes before it

A file may be anyone's. Nothing in it is believed before it has been checked, and nothing in it can be code.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model.checkpoint.safetensors import DTYPES, PREFIX, Header, byte_view, parse_header
from model.checkpoint.writer import TensorSpec, Writer, encode_header
from model.errors import ModelError, quoted
from model.kv_cache import KVCache
from runtime.errors import RequestError
from runtime.held import Held
from runtime.origin import Origin
from runtime.requests import more_context
from runtime.runner import ModelRunner

FORMAT, VERSION = "mixtral-runtime session", "1"
IDS, DIGEST = "ids", "sha256"
MOST_HEADER_BYTES = 4 << 20  # mostly messages; as Python's objects they may take 50 times that
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # pickle.dump, torch.save
READ_BYTES = 1 << 20

Messages = list[dict[str, str]]


def save_session(path: Path, runner: ModelRunner, messages: Messages, ids: list[int], kv: KVCache) -> None:
    """Write a file, whose name it takes when it is complete and on the disk. `ids` are the tokens in `kv`.

    Raises `RequestError` if the file cannot be written.
    """
    metadata = Origin.of(runner, kv).metadata() | {
        "format": FORMAT,
        "version": VERSION,
        "messages": json.dumps(messages, ensure_ascii=False),  # the header's JSON escapes it once
    }
    held = runner.held(kv, len(ids))
    specs = tensor_specs(held, len(ids))
    if (size := len(encode_header(specs, metadata))) > MOST_HEADER_BYTES:
        raise RequestError(
            f"{path}: the messages take {size} bytes, and a saved session has room for {MOST_HEADER_BYTES}; "
            "begin a new conversation"
        )
    digest = hashlib.sha256()
    try:
        with saving_in(path.parent), Writer(path, specs, metadata, digest.update) as writer:
            keep_permissions(path, writer.file.fileno())
            writer.write(IDS, torch.tensor(ids, dtype=torch.int64, device="cpu"))
            for spec, part in zip(held.specs, held.read(), strict=True):
                writer.write(spec.name, part)
            writer.write(DIGEST, torch.tensor(list(digest.digest()), dtype=torch.uint8, device="cpu"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror})") from error
    except ValueError as error:  # a NUL in the path
        raise RequestError(f"{quoted(str(path))}: cannot be written ({error})") from error


@contextmanager
def saving_in(folder: Path) -> Iterator[None]:
    """Inside, no other thread or process saves to this folder, because two that save to one file would write
    to one unfinished file. Where the system cannot lock a folder, trust that none does."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # as of NFS
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def keep_permissions(path: Path, handle: int) -> None:
    """Give an open file the permissions of the one that it will replace: its owner may have closed it to
    others."""
    if sys.platform != "win32":
        with suppress(FileNotFoundError):
            os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))


def load_session(path: Path, runner: ModelRunner, kv: KVCache) -> tuple[Messages, list[int]]:
    """Fill an empty KV cache from a file. Returns the messages, and the tokens that are now in `kv`.

    Raises `RequestError`, and leaves `kv` empty, if the file is not a saved session, is damaged, is of
    another model, dtype or width of keys and values, or holds more tokens than `kv`.
    """
    try:
        if not path.is_file():
            there = "a folder" if path.is_dir() else "not a regular file"
            what = there if path.exists() else "no such file"
            raise RequestError(f"{path}: {what}; give a file that Session.save wrote")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = checked_header(path, file, size)
            check_digest(path, file, header, size)
            messages = checked_messages(path, header)
            Origin.of(runner, kv).check(path, header.metadata)
            length = checked_length(path, header, kv, runner.config.context)
            held = runner.held(kv, length)
            ids_spec, *specs, _ = checked_specs(path, header, held, length)
            ids = read_tensor(path, file, header, ids_spec)
            if length and not 0 <= int(ids.min()) <= int(ids.max()) < runner.config.vocab:
                raise damaged(path, f"it has ids outside the vocabulary of {runner.config.vocab}")
            held.write(read_tensor(path, file, header, spec) for spec in specs)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL in the path
        raise RequestError(f"{quoted(str(path))}: cannot be read ({error})") from error
    kv.length = length
    return messages, ids.tolist()


def tensor_specs(held: Held, length: int) -> list[TensorSpec]:
    """All tensors of a file with `length` tokens, in order."""
    return [
        TensorSpec(IDS, torch.int64, (length,)),
        *held.specs,
        TensorSpec(DIGEST, torch.uint8, (hashlib.sha256().digest_size,)),
    ]


def checked_header(path: Path, file: BinaryIO, size: int) -> Header:
    """The header of a saved session. Raises `RequestError` if the file is something else."""
    prefix = file.read(PREFIX)
    if prefix.startswith(PICKLES):
        raise RequestError(
            f"{path}: a pickle, which runs code when it is opened and is never read; give a file that "
            "Session.save wrote"
        )

    def read(length: int) -> bytes:
        if length > MOST_HEADER_BYTES:
            raise ModelError(f"its first 8 bytes promise a header of {length} bytes")
        return file.read(length)

    try:
        header = parse_header(path, prefix, read, size)
    except ModelError as error:
        reason = str(error).removeprefix(f"{path}: ").removesuffix("; download it again")
        raise RequestError(f"{path}: damaged, or not a saved session: {reason}") from error
    if (found := header.metadata.get("format")) != FORMAT:
        raise RequestError(
            f"{path}: a safetensors file of format {quoted(found)}, not a saved session; give a file that "
            "Session.save wrote"
        )
    if (version := header.metadata.get("version")) != VERSION:
        raise RequestError(
            f"{path}: a saved session of version {quoted(version)}, and this program reads version "
            f"{VERSION}; use the program that wrote it"
        )
    return header


def check_digest(path: Path, file: BinaryIO, header: Header, size: int) -> None:
    """Raises `RequestError` unless the file ends with the SHA-256 of all bytes before."""
    digest = hashlib.sha256()
    last = list(header.tensors)[-1:]
    remaining = size - digest.digest_size
    if last != [DIGEST] or header.tensors[DIGEST].offset != remaining:
        raise damaged(path, "it does not end with a digest")
    file.seek(0)
    while remaining and (data := file.read(min(READ_BYTES, remaining))):
        digest.update(data)
        remaining -= len(data)
    if file.read() != digest.digest():
        raise damaged(path, "its bytes do not have the SHA-256 that was saved with them")


def checked_messages(path: Path, header: Header) -> Messages:
    try:
        messages: Any = json.loads(header.metadata.get("messages", ""))
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its messages are not JSON") from error
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise damaged(path, "its messages are not pairs of role and content")
    return messages


def is_message(value: Any) -> bool:
    """Whether a value from JSON is a message.

    >>> is_message({"role": "user", "content": "Hi"}), is_message({"role": "user"}), is_message("Hi")
    (True, False, False)
    """
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in value.values())
    )


def checked_length(path: Path, header: Header, kv: KVCache, most: int) -> int:
    """The number of tokens. Raises `RequestError` if they do not fit `kv`. `most` is the largest context that
    the model was made for."""
    shape = header.tensors[IDS].shape if IDS in header.tensors else ()
    if len(shape) != 1:
        raise damaged(path, "it has no list of ids")
    (length,) = shape
    if length > kv.capacity:
        raise RequestError(
            f"{path}: the conversation has {length} tokens, and the context holds {kv.capacity}; "
            f"begin a new one{more_context(' or ', kv.capacity, most)}"
        )
    return length


def checked_specs(path: Path, header: Header, held: Held, length: int) -> list[TensorSpec]:
    """What the file has. Raises `RequestError` if that is not what `held` has of `length` tokens."""
    specs = tensor_specs(held, length)
    expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    found = {name: (DTYPES.get(entry.dtype), entry.shape) for name, entry in header.tensors.items()}
    if found != expected:
        wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        raise damaged(path, f"tensor {quoted(wrong[0])} is not that of {length} tokens")
    return specs


def read_tensor(path: Path, file: BinaryIO, header: Header, spec: TensorSpec) -> Tensor:
    """A checked tensor, on the CPU."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
    file.seek(header.tensors[spec.name].offset)
    memory = byte_view(tensor)
    if file.readinto(memory) < len(memory):  # type: ignore[attr-defined]
        raise damaged(path, f"it was cut short in {quoted(spec.name)} while it was read")
    return tensor


def damaged(path: Path, reason: str) -> RequestError:
    return RequestError(f"{path}: damaged: {reason}; take a copy of it, or begin a new conversation")
