"""Download a file so that a later run goes on where this one ended.

`huggingface_hub` itself begins a file anew in every process. Here the bytes are kept under another name until
all are there, and no byte is asked for that has come. The name is none that the library uses: it does not
always write a file from its beginning to its end.
"""

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from runtime.errors import LoadError
from runtime.hub.remote import TIMEOUT, Remote

INCOMPLETE = ".part"
TRIES = 5  # in a row that bring nothing
PAUSE = 1.0  # seconds before the next one
TRANSIENT = (408, 429, 500, 502, 503, 504)  # statuses that may be others soon

Advance = Callable[[int], None]


def fetch(remote: Remote, file: str, target: Path, advance: Advance) -> None:
    """Bring a file of a model to the path `target`, unless it is there. `advance` is called with each number
    of bytes that has come, first with those of earlier runs. Only one process may do this for a target.

    Raises what `errors.explained` explains.
    """
    size = remote.files[file].bytes
    if target.is_file():
        advance(size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + INCOMPLETE)
    with part.open("ab", buffering=0) as out:
        if out.tell() > size:
            out.truncate(0)
        advance(min(out.tell(), size))
        receive_all(remote, file, out, size, advance)
        os.fsync(out.fileno())
    os.replace(part, target)


def read(remote: Remote, file: str, start: int, stop: int, go_on: Callable[[], None]) -> bytes:
    """Bytes `start` to `stop` - 1 of a file, which are near its beginning; fewer if it ends before.

    `go_on` may raise an error to end this.
    """
    out = io.BytesIO()
    out.seek(start)
    receive_all(remote, file, out, min(stop, remote.files[file].bytes), lambda count: go_on())
    return out.getvalue()[start:]


def receive_all(remote: Remote, file: str, out: BinaryIO, stop: int, advance: Advance) -> None:
    """Write a file's bytes to `out` from its position to `stop`. A connection that breaks is made again.

    `advance` is called before each try, too, and may raise an error to end this.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    fruitless = 0
    while (at := out.tell()) < stop:
        advance(0)
        try:
            receive(remote, file, out, at, stop, advance)
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT:
                raise
            fruitless = 0 if out.tell() > at else fruitless + 1
            if fruitless == TRIES:
                raise
            time.sleep(PAUSE)


def receive(remote: Remote, file: str, out: BinaryIO, start: int, stop: int, advance: Advance) -> None:
    """Write bytes `start` to `stop` - 1 of a file as they come."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    size = remote.files[file].bytes
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
    with get_session().stream(
        "GET", remote.url(file), headers=headers, follow_redirects=True, timeout=TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        if response.headers.get("Content-Range") != f"bytes {start}-{stop - 1}/{size}":
            raise LoadError(
                f"{remote.name}: {file} is not served from byte {start} of {size} (status "
                f"{response.status_code}); the hub, or a proxy before it, is at fault"
            )
        for data in response.iter_raw():
            out.write(data)
            advance(len(data))
