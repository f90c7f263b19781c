"""A model at the Hugging Face hub, of which only what the next output file needs is ever on the disk."""

import hashlib
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.hub.cache import Bar, bring, bring_small, storage
from runtime.hub.errors import explained
from runtime.hub.names import HubName
from runtime.hub.needed import ggufs, weights
from runtime.hub.opening import remote_headers
from runtime.hub.ranges import Range, fetch_ranges, merged, record_of, remove
from runtime.hub.remote import Remote
from tools.quantize.names import DOWNLOAD
from tools.quantize.sources.source import Extent, ModelFiles


@dataclass(frozen=True)
class Download:
    """Brings parts of a model's weight files to a folder. `files` are their names at the hub, by path."""

    remote: Remote
    folder: Path
    files: Mapping[Path, str]

    def bring(self, extents: Collection[Extent]) -> None:
        """Have these bytes in the folder, and no others of the model's. Raises `LoadError` if they do not
        come."""
        wanted: dict[Path, list[Range]] = {}
        for path, start, stop in extents:
            wanted.setdefault(path, []).append((start, stop))
        for path in self.files:
            if path not in wanted and record_of(path).exists():
                remove(path)
        for other in self.folder.parent.iterdir() if self.folder.parent.is_dir() else ():
            if other != self.folder:  # of another commit
                shutil.rmtree(other, ignore_errors=True)
        with explained(self.remote.name):
            for path, ranges in sorted(wanted.items()):
                fetch_ranges(self.remote, self.files[path], path, merged(ranges))

    def fingerprint(self) -> str:
        """A digest of what the hub says of the weight files."""
        known = sorted((file, self.remote.files[file].etag) for file in self.files.values())
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


def files_at_hub(remote: Remote, out: Path) -> ModelFiles:
    """The files of a model at the hub. Headers are read, and weights come when they are needed, to the
    output's folder `out`. Raises what `errors.explained` explains, and `ModelError`."""
    small = bring_small(remote)
    found = weights(remote.name, remote.files, small)
    folder = out / DOWNLOAD / remote.commit
    headers = remote_headers(remote, found, folder)
    download = Download(remote, folder, dict(zip(headers, found, strict=True)))
    return ModelFiles(
        name=source_name(remote.name),
        folder=small,
        paths=[*headers],
        headers=headers,
        fingerprint=download.fingerprint,
        bring=download.bring,
        commit=remote.commit,
    )
