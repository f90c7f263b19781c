"""Whatever can go wrong between here and the hub, in one line."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import quoted
from runtime.errors import LoadError
from runtime.hub.names import HubName

INSTALL = "pip install huggingface_hub"
AGAIN = "the same command goes on where it was"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


@contextmanager
def explained(name: HubName, folder: Path | None = None) -> Iterator[None]:
    """Inside, errors of `huggingface_hub`, of connections and of the disk become `LoadError`s. Files go to
    `folder`, or to the Hugging Face cache.

    Also keeps the library from writing to stderr.
    """
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise LoadError(
            f"{name}: no such folder; if it is a model at the Hugging Face hub, {INSTALL} to download it"
        ) from None
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    at, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{name.repo}"
    token = "a token (hf auth login, or HF_TOKEN)"
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        place = constants.HF_HUB_CACHE
        raise LoadError(
            f"{name}: no such folder, and not all of it is in the cache ({place}); unset HF_HUB_OFFLINE to "
            "download it"
        ) from error
    except errors.HFValidationError as error:
        raise LoadError(f"{name}: no such folder, and no model at the hub can have such a name") from error
    except errors.GatedRepoError as error:
        raise LoadError(f"{name}: gated; accept the terms at {page}, and give {token}") from error
    except errors.RepositoryNotFoundError as error:
        raise LoadError(
            f"{name}: no such folder, and no such model at {at}, unless it is private and needs {token}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LoadError(f"{name}: no revision {quoted(name.revision)}; look at {page}") from error
    except errors.HfHubHTTPError as error:
        raise LoadError(
            f"{name}: {at} answered with status {status_in_words(error.response.status_code)}"
        ) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:  # refused, broken off, timed out
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        raise LoadError(f"{name}: no connection to {at} ({type(cause).__name__}); {AGAIN}") from error
    except OSError as error:
        where = error.filename or folder or constants.HF_HUB_CACHE
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LoadError(f"{name}: the disk is full ({where}); make room, and {AGAIN}") from error
        elsewhere = "" if folder or error.errno not in NOT_WRITABLE else "; name another cache by HF_HOME"
        raise LoadError(f"{name}: {where}: {error.strerror or error}{elsewhere}") from error
    finally:
        logger.setLevel(level)


def status_in_words(status: int) -> str:
    """What to do about an answer that is an error."""
    if status == 401:
        return "401: the token is not valid; hf auth login again, or mend HF_TOKEN"
    if status == 403:
        return "403: the token does not permit this, or the model is disabled; look at its page"
    return f"{status}; try again later, and {AGAIN}"
