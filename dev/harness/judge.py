"""Judges whether an error is one that the program promises: of its family, with a message of one line."""

import traceback
from types import TracebackType

from dev.harness.outcome import Leaked, Outcome, Verdict, Wrong
from model.errors import ModelError
from runtime.errors import MixtralError
from tokenizer import TokenizerError

FAMILY = (MixtralError, ModelError, TokenizerError)
LONGEST = 500  # characters of a message


def fault_of(message: str) -> str:
    """Why a message is not fit for a terminal; empty if it is.

    >>> fault_of("config.json: hidden_size is -1"), fault_of("")
    ('', 'an empty message')
    >>> fault_of("two\\nlines"), fault_of("\\x1b[2J"), fault_of("y" * 501)
    ('a message of 2 lines', 'a message that holds U+001B', 'a message of 501 characters')
    """
    if not message.strip():
        return "an empty message"
    if len(lines := message.splitlines()) > 1:
        return f"a message of {len(lines)} lines"
    for character in message:
        if not character.isprintable():
            return f"a message that holds U+{ord(character):04X}"
    return f"a message of {len(message)} characters" if len(message) > LONGEST else ""


def judge(at: int, error: BaseException) -> Outcome:
    """The outcome of a case that ended in this error."""
    if isinstance(error, Wrong):
        return Outcome(at, Verdict.WRONG, shown(str(error)), trace_of(error))
    if isinstance(error, Leaked):
        return Outcome(at, Verdict.LEAK, shown(str(error)), trace_of(error))
    if isinstance(error, FAMILY):
        fault = fault_of(str(error))
        verdict = Verdict.RAW if fault else Verdict.REFUSED
        said = f"{fault}: {shown(str(error))}" if fault else shown(str(error))
        return Outcome(at, verdict, said, trace_of(error) if fault else "")
    where = origin(error.__traceback__)
    return Outcome(at, Verdict.RAW, f"{type(error).__name__} {where}: {shown(str(error))}", trace_of(error))


def shown(text: str, limit: int = 200) -> str:
    """A text as the report shows it: printable, and cut to `limit` characters."""
    text = text[: 2 * limit].encode("unicode_escape").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def origin(trace: TracebackType | None) -> str:
    """The file and line where an error was raised."""
    frames = traceback.extract_tb(trace)
    return f"at {'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno}" if frames else ""


def trace_of(error: BaseException, limit: int = 6000) -> str:
    return "".join(traceback.format_exception(error, limit=-12))[-limit:]
