"""The Hugging Face cache: what it holds of a model, and how it gets the rest.

`huggingface_hub` describes its layout (huggingface.co/docs/huggingface_hub, "Understand caching"):

    models--org--name/refs/main          the commit that a branch was at
    models--org--name/snapshots/COMMIT/  the files of a commit, which are links
    models--org--name/blobs/ETAG         to their contents
"""

import re
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from model.checkpoint import Checkpoint
from model.checkpoint.files import weight_files
from model.checkpoint.load import checkpoint_of
from model.errors import ModelError
from runtime.errors import LoadError
from runtime.hub.at_once import at_once
from runtime.hub.fetching import INCOMPLETE, PAUSE, Advance, fetch
from runtime.hub.headers import remote_headers
from runtime.hub.names import HubName
from runtime.hub.needed import beside_weights, weights
from runtime.hub.remote import Remote
from runtime.units import format_bytes
from tokenizer.errors import TokenizerError
from tokenizer.model_file import find_model as find_tokenizer

WORKERS = 4  # files at once
COMMIT = re.compile("[0-9a-f]{40}")

Bar = Callable[[int], AbstractContextManager[Advance]]
Judge = Callable[[Checkpoint], None]


def storage(name: HubName) -> Path:
    """The folder of a model in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model")


def cached(name: HubName) -> Path | None:
    """The folder of the commit that a name means as far as the cache knows; None if it knows none."""
    place, commit = storage(name), name.revision
    if not COMMIT.fullmatch(commit):
        ref = place / "refs" / commit
        commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    folder = place / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def has_weights(folder: Path) -> bool:
    """Whether a folder has a configuration and all of its weight files."""
    try:
        return any((folder / each).is_file() for each in ("config.json", "params.json")) and bool(
            weight_files(folder)
        )
    except ModelError:
        return False


def has_tokenizer(folder: Path) -> bool:
    try:
        return find_tokenizer(folder).is_file()
    except TokenizerError:
        return False


def offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def snapshot(name: HubName, progress: Bar | None = None, judge: Judge | None = None) -> Path:
    """The folder of a model with all its files. Nothing is asked of the hub if the cache has all.

    Configuration and headers are checked before weights are downloaded, and `judge` is called with them. Its
    errors pass. `progress` is as for `Engine.load`, and counts bytes. Raises what `errors.explained`
    explains, and `ModelError` if the model is none that is read here.
    """
    folder = cached(name)
    if folder and has_weights(folder) and (has_tokenizer(folder) or offline()):
        return folder
    remote = Remote.find(name)
    folder = bring_small(remote)
    files = weights(name, remote.files, folder)
    if not has_weights(folder):
        checkpoint = checkpoint_of(folder, remote_headers(remote, files, folder))
        if judge:
            judge(checkpoint)
        bring(remote, files, progress)
    remember(remote)
    return folder


def bring_small(remote: Remote) -> Path:
    """Bring configuration and tokenizer to the cache. Returns the commit's folder there."""
    bring(remote, beside_weights(remote.files))
    return storage(remote.name) / "snapshots" / remote.commit


def bring(remote: Remote, files: Iterable[str], progress: Bar | None = None) -> None:
    """Bring these files of a model to the cache, several at once. Raises `LoadError` if they do not fit the
    disk."""
    wanted = list(files)
    check_space(remote, wanted)
    total = sum(remote.files[file].bytes for file in wanted)
    lock = threading.Lock()
    with progress(total) if progress else nullcontext(lambda count: None) as advance:

        def bring_one(file: str, go_on: Callable[[], None]) -> None:
            def count(size: int) -> None:
                go_on()
                with lock:
                    advance(size)

            place(remote, file, count)

        at_once(bring_one, wanted, WORKERS)


def place(remote: Remote, file: str, advance: Advance) -> None:
    """Bring one file to the cache, unless it is there."""
    from filelock import Timeout
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    folder, etag = storage(remote.name), remote.files[file].etag
    if (folder / "snapshots" / remote.commit / file).is_file():
        advance(remote.files[file].bytes)
        return
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder.name / f"{etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with WeakFileLock(lock, timeout=PAUSE):
                fetch(remote, file, folder / "blobs" / etag, advance)
            break
        except Timeout:  # another process downloads the file
            advance(0)
    hf_hub_download(remote.name.repo, file, revision=remote.commit)  # which links to what is there


def check_space(remote: Remote, files: Iterable[str]) -> None:
    """Raises `LoadError` if these files do not fit the cache's disk."""
    blobs = storage(remote.name) / "blobs"
    sizes = {remote.files[file].etag: remote.files[file].bytes for file in files}
    needed = sum(size - there(blobs / etag, size) for etag, size in sizes.items())
    parent = next(each for each in (blobs, *blobs.parents) if each.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise LoadError(
            f"{remote.name}: {format_bytes(needed)} are to be downloaded to {parent}, and "
            f"{format_bytes(free)} are free; make room, or name another disk by HF_HOME"
        )


def there(blob: Path, size: int) -> int:
    """How many bytes of a file have come before."""
    if blob.is_file():
        return size
    part = blob.with_name(blob.name + INCOMPLETE)
    return min(part.stat().st_size, size) if part.is_file() else 0


def remember(remote: Remote) -> None:
    """Note which commit the revision is at. This comes last, so what is noted is complete."""
    if not COMMIT.fullmatch(remote.name.revision):
        ref = storage(remote.name) / "refs" / remote.name.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(remote.commit)
