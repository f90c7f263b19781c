"""Prompts from files, pipes and terminals, as text.

A text file is UTF-8, with or without a byte order mark. One line end at its very end is dropped, of any
system (`\\n`, `\\r\\n` or `\\r`). An editor or a shell has put it there, and a model would take it for the
end of a line. All other line ends belong to the text, and stay unchanged.
"""

import codecs
import sys
from pathlib import Path

from model.errors import quoted
from runtime.errors import RequestError
from runtime.shell.command import say


def read_prompt(text: str | None, file: Path | None) -> str:
    """Return the prompt: `text` unchanged, or the contents of `file`, or of stdin.

    Raises `RequestError` if a file or stdin is empty or holds no text, and `OSError` if it cannot be read.
    """
    if text is not None:
        return text
    source = quoted(str(file)) if file else "stdin"
    if not file and sys.stdin.isatty():
        say("Write the text to continue; Ctrl-D on a new line ends it.")
    data = file.read_bytes() if file else sys.stdin.buffer.read()
    if not data:
        raise RequestError(f"{source} is empty; give a prompt (--prompt '' lets the model begin by itself)")
    return decode(data, source)


def decode(data: bytes, source: str) -> str:
    """Decode text that was typed, piped in or read. `source` names it in messages.

    Raises `RequestError` if it is not UTF-8.

    >>> decode(b"\\xef\\xbb\\xbfone\\r\\ntwo\\r\\n", "stdin")
    'one\\r\\ntwo'
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RequestError(f"{source} is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save it as UTF-8"
        ) from error
    text = text.removeprefix("\ufeff")
    return next((text.removesuffix(end) for end in ("\r\n", "\n", "\r") if text.endswith(end)), text)
