"""What the hub says of a model, and bytes of its files."""

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.hub.names import HubName


@dataclass(frozen=True)
class RemoteFile:
    """A file at the hub. `etag` names its contents."""

    bytes: int
    etag: str


@dataclass(frozen=True)
class Remote:
    """A model at the hub at one commit, with all its files by name."""

    name: HubName
    commit: str
    files: Mapping[str, RemoteFile]

    @staticmethod
    def find(name: HubName, commit: str | None = None) -> "Remote":
        """Ask the hub, at `commit` if it is given instead of the name's revision. Raises what
        `errors.explained` explains."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(name.repo, revision=commit or name.revision, files_metadata=True)
        files = {
            each.rfilename: RemoteFile(each.size or 0, each.lfs.sha256 if each.lfs else each.blob_id or "")
            for each in info.siblings or ()
        }
        return Remote(name, info.sha or name.revision, files)

    def url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name.repo, file, revision=self.commit)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` - 1 of a file, fewer if it ends before."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        stop = min(stop, self.files[file].bytes)
        if start >= stop:
            return b""
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self.url(file), headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise OSError(f"the server ignores ranges (status {response.status_code})")
            return response.read()
