"""A model at the Hugging Face hub, of which only what the next output file needs is ever on the disk."""

import hashlib
import shutil
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model.checkpoint.safetensors import read_header
from runtime.hub.cache import COMMIT, Bar, bring, bring_small, storage
from runtime.hub.errors import explained
from runtime.hub.headers import remote_headers
from runtime.hub.names import HubName
from runtime.hub.needed import ggufs, weights
from runtime.hub.ranges import Range, fetch_ranges, merged, record_of, remove
from runtime.hub.remote import Remote
from tools.quantize.names import DOWNLOAD
from tools.quantize.sources.source import Extent, ModelFiles


@dataclass(frozen=True)
class Download:
    """Brings parts of weight files to a folder. `files` are their names at the hub, by path. `progress` is as
    for `Engine.load`."""

    remote: Remote
    folder: Path
    files: Mapping[Path, str]
    progress: Bar | None

    def bring(self, extents: Collection[Extent]) -> None:
        """Have these bytes in the folder, as far as they are of its files, and no others. Raises `LoadError`
        if they do not come."""
        wanted: dict[Path, list[Range]] = {}
        for path, start, stop in extents:
            if path in self.files:
                wanted.setdefault(path, []).append((start, stop))
        for path in self.files:
            if path not in wanted and record_of(path).exists():
                remove(path)
        for other in self.folder.parent.iterdir() if self.folder.parent.is_dir() else ():
            if COMMIT.fullmatch(other.name) and other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        parts = {path: merged(ranges) for path, ranges in sorted(wanted.items())}
        total = sum(stop - start for ranges in parts.values() for start, stop in ranges)
        bar = self.progress(total) if self.progress else nullcontext(lambda count: None)
        with explained(self.remote.name, self.folder), bar as advance:
            for path, ranges in parts.items():
                fetch_ranges(self.remote, self.files[path], path, ranges, advance)


def fingerprint(remote: Remote, files: Collection[str]) -> str:
    """A digest of what the hub says of these files."""
    known = sorted((file, remote.files[file].etag) for file in files)
    return hashlib.sha256(repr(known).encode()).hexdigest()


def source_name(name: HubName) -> str:
    """What the output calls the model, as if it were in a folder."""
    return name.repo.rpartition("/")[2]


def download_gguf(remote: Remote, progress: Bar | None) -> Path:
    """Bring a model in GGUF to the Hugging Face cache. Returns its first file. Raises what
    `errors.explained` explains, and `ModelError` if there is no one GGUF model."""
    names = ggufs(remote.name, remote.files)
    bring(remote, names, progress)
    return storage(remote.name) / "snapshots" / remote.commit / names[0]


def files_at_hub(remote: Remote, out: Path, progress: Bar | None) -> ModelFiles:
    """The files of a model at the hub. Headers are read, and weights come when they are needed, to the
    output's folder `out`, unless the Hugging Face cache has the file. Raises what `errors.explained`
    explains, and `ModelError`."""
    small, folder = bring_small(remote), out / DOWNLOAD / remote.commit
    found = weights(remote.name, remote.files, small)
    there = [file for file in found if (small / file).is_file()]
    missing = [file for file in found if file not in there]
    headers = remote_headers(remote, missing, folder)
    download = Download(remote, folder, dict(zip(headers, missing, strict=True)), progress)
    headers |= {small / file: read_header(small / file) for file in there}
    return ModelFiles(
        name=source_name(remote.name),
        folder=small,
        paths=[*headers],
        headers=headers,
        fingerprint=partial(fingerprint, remote, found),
        bring=download.bring,
        origin=f"{remote.name} at {remote.commit}",
    )
