"""What the hub says of a model, and bytes of its files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import LoadError
from runtime.hub.names import HubName

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

TIMEOUT = 10.0  # seconds without a byte


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

        with asking(name):
            info = HfApi().model_info(
                name.repo, revision=commit or name.revision, files_metadata=True, timeout=TIMEOUT
            )
            files = dict(map(described, info.siblings or ()))
            if not info.sha:
                raise ValueError("no commit")
        return Remote(name, info.sha, files)

    def url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name.repo, file, revision=self.commit)


def described(sibling: "RepoSibling") -> tuple[str, RemoteFile]:
    """A file's name, and what is to be known of it. Raises `ValueError` if the hub has not said it."""
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if sibling.size is None or not etag:
        raise ValueError(f"no size or ETag of {sibling.rfilename}")
    return sibling.rfilename, RemoteFile(sibling.size, etag)


@contextmanager
def asking(name: HubName) -> Iterator[None]:
    """Inside, the hub is asked whether there is such a model. The name may be a path that is mistyped."""
    from huggingface_hub import constants, errors

    at = constants.ENDPOINT
    try:
        yield
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError):
        raise
    except errors.HTTPError as error:  # of the HTTP library: refused, broken off, timed out
        raise LoadError(
            f"{name}: no such folder, and no connection to {at} ({type(error).__name__}); try again later"
        ) from error
    except UnicodeEncodeError as error:
        raise LoadError(f"{name}: the token has a character that no token has; mend HF_TOKEN") from error
    except Exception as error:  # whatever the library raises for an answer that is no hub's, or an address
        raise LoadError(
            f"{name}: no such folder, and {at} does not answer as a hub does ({type(error).__name__}); look "
            "at HF_ENDPOINT, or whether the network asks for a login"
        ) from error
