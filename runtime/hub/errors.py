"""Whatever can go wrong between here and the hub, in one line."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from model.errors import quoted
from runtime.errors import LoadError
from runtime.hub.names import HubName

INSTALL = "pip install huggingface_hub"
AGAIN = "the same command goes on where it was"


@contextmanager
def explained(name: HubName) -> Iterator[None]:
    """Inside, errors of `huggingface_hub`, of connections and of the disk become `LoadError`s.

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
        raise LoadError(f"{name}: not in the cache ({place}), and HF_HUB_OFFLINE is set; unset it") from error
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
            f"{name}: {at} answered with status {error.response.status_code}; try again later, and {AGAIN}"
        ) from error
    except errors.HTTPError as error:  # of the HTTP library: refused, broken off, timed out
        raise LoadError(f"{name}: no connection to {at} ({type(error).__name__}); {AGAIN}") from error
    except OSError as error:
        where = error.filename or constants.HF_HUB_CACHE
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LoadError(f"{name}: the disk is full ({where}); make room, and {AGAIN}") from error
        raise LoadError(f"{name}: {where}: {error.strerror or error}") from error
    finally:
        logger.setLevel(level)
