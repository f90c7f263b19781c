"""Reads a trace and trusts nothing in it: the file may be cut off, edited, or no trace at all."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

from model.checkpoint.files import some
from model.config import MOST
from model.errors import quoted
from runtime.experts.trace import FORMAT, NAMES, VERSION, Event, Header, TraceError

MAX_LINE = 1 << 20  # bytes; lines of a trace have a few hundred
MAX_NUMBER = 1 << 53  # up to here floats are exact, and no sum of such numbers overflows
POLICY = re.compile(r"[A-Za-z0-9_.-]{1,64}")
EVENTS: dict[str, Callable[..., Event]] = {name: kind for kind, name in NAMES.items()}
FIELDS = {name: [f.name for f in dataclasses.fields(kind)] for kind, name in NAMES.items()}
KINDS = ("demand", "guess", "placed", "compute")  # of a copy or a read
SOURCES = ("host", "file", "compute")  # of a miss
# Fields that traces of earlier programs lack: all experts had berths, and the device computed all.
ADDED_TO_HEADER: dict[str, Any] = {"berths": 0, "spare_berths": 0, "in_berths": []}
ADDED = {*ADDED_TO_HEADER, "source", "placed"}


@dataclass(frozen=True)
class Trace:
    """The contents of a trace file."""

    header: Header
    events: list[Event]
    truncated: bool  # the writer was interrupted: the last line was incomplete, and is left out


def read_trace(path: str | PathLike[str]) -> Trace:
    """Read a trace. Raises `TraceError`, `FILE:LINE: reason`, for a file that is none or cannot be read."""
    header: Header | None = None
    events: list[Event] = []
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(lines(file), start=1):
                try:
                    content = parse_line(line)
                    if header is None:
                        header = parse_header(content)
                    else:
                        events.append(parse_event(content, header))
                except ValueError as error:
                    if header and not line.endswith(b"\n") and len(line) <= MAX_LINE:
                        return Trace(header, events, truncated=True)
                    raise TraceError(f"{path}:{number}: {error}") from None
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a path with a NUL in it
        raise TraceError(f"{quoted(path)}: {error}") from error
    if header is None:
        raise TraceError(f"{path}:1: the file is empty; a trace begins with a header")
    return Trace(header, events, truncated=False)


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The file's lines. One that is too long comes in parts."""
    while line := file.readline(MAX_LINE + 1):
        yield line


def parse_line(line: bytes) -> dict[str, Any]:
    """The object on a line. Raises `ValueError` with the reason if there is none, as all parsers here do."""
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of more than {MAX_LINE} bytes; not a trace")

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number")

    try:
        content = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that a trace would have: nested too deep") from None
    except ValueError as error:
        if "digits" in str(error):  # Python's limit, whose advice does not help here
            raise ValueError("not JSON that a trace would have: a number too long") from None
        raise
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def parse_header(content: dict[str, Any]) -> Header:
    """
    >>> parse_header({"format": "mixtral-trace", "version": 2})
    Traceback (most recent call last):
    ...
    ValueError: format version 2; this program reads version 1
    """
    if content.pop("format", None) != FORMAT:
        raise ValueError(f'not a trace: a trace\'s first line has "format": "{FORMAT}"')
    if (version := content.pop("version", None)) != VERSION:
        raise ValueError(f"format version {quoted(version)}; this program reads version {VERSION}")
    check_names(content, [f.name for f in dataclasses.fields(Header)], "the header")
    content = ADDED_TO_HEADER | content
    for name in ("layers", "experts", "experts_per_token", "spares", "seed", "expert_bytes"):
        least = 0 if name in ("spares", "seed") else 1
        require(whole(content[name]) and content[name] >= least, name, content, f"a whole number >= {least}")
    for name in ("layers", "experts"):
        require(content[name] <= MOST[name], name, content, f"at most {MOST[name]}")
    L, E = content["layers"], content["experts"]
    slots = content["slots"]
    counts = isinstance(slots, list) and len(slots) == L and all(whole(s) and s >= 1 for s in slots)
    require(counts, "slots", content, f"{L} whole numbers >= 1, one for each layer")
    require(content["experts_per_token"] <= E, "experts_per_token", content, f"at most {E}, the experts")
    for name, most in (("berths", L * E), ("spare_berths", content["berths"])):
        count = content[name]
        require(whole(count) and 0 <= count <= most, name, content, f"a whole number from 0 to {most}")
    there = content["in_berths"]
    known = isinstance(there, list) and all(whole(e) and 0 <= e < L * E for e in there)
    known = known and len(set(there)) == len(there) <= content["berths"]
    require(
        known, "in_berths", content, f"different experts from 0 to {L * E - 1}, of each berth at most one"
    )
    policy, options = content["policy"], content["options"]
    require(isinstance(policy, str) and bool(POLICY.fullmatch(policy)), "policy", content, "a name")
    plain = isinstance(options, dict) and all(
        value is None or isinstance(value, str | bool) or number(value) for value in options.values()
    )
    require(plain, "options", content, "an object of plain values")
    return Header(**content | {"slots": tuple(slots), "in_berths": tuple(there)})


def parse_event(content: dict[str, Any], header: Header) -> Event:
    """
    >>> header = Header(32, 8, 2, slots=(4,) * 32, spares=2, policy="lru", seed=0, expert_bytes=93_628_416)
    >>> parse_event({"event": "hit", "step": 7, "layer": 0, "expert": 6}, header)
    Hit(step=7, layer=0, expert=6)
    >>> parse_event({"event": "hit", "step": 7, "layer": 32, "expert": 6}, header)
    Traceback (most recent call last):
    ...
    ValueError: hit: layer is 32, and must be a whole number from 0 to 31
    """
    name = content.pop("event", None)
    if not isinstance(name, str) or name not in EVENTS:
        raise ValueError(f"event is {quoted(name)}, and must be one of {', '.join(EVENTS)}")
    check_names(content, FIELDS[name], name)
    for field_name, value in content.items():
        try:
            content[field_name] = parse_field(field_name, value, header)
        except ValueError as error:
            raise ValueError(f"{name}: {field_name} is {quoted(value)}, and must be {error}") from None
    weights = content.get("weights")
    if weights is not None and len(weights) != len(content["experts"]):
        raise ValueError(f"{name}: {len(weights)} weights for {len(content['experts'])} experts")
    return EVENTS[name](**content)


def parse_field(name: str, value: Any, header: Header) -> Any:
    """The value as an event's field. Raises `ValueError` with what it has to be."""
    E = header.experts
    if name in ("layer", "expert", "evicted"):
        most = (header.layers if name == "layer" else E) - 1
        good = (whole(value) and 0 <= value <= most) or (name == "evicted" and value is None)
        expected = f"a whole number from 0 to {most}" + (" or null" if name == "evicted" else "")
    elif name == "experts":
        good = isinstance(value, list) and all(whole(e) and 0 <= e < E for e in value)
        good = good and len(set(value)) == len(value) > 0
        expected, value = f"different experts from 0 to {E - 1}", tuple(value) if good else value
    elif name == "weights":
        good = value is None or (isinstance(value, list) and all(number(w) and w >= 0 for w in value))
        expected, value = "numbers >= 0, or null", tuple(value) if good and value is not None else value
    elif name == "kind":
        good, expected = value in KINDS, '"demand", "guess", "placed" or "compute"'
    elif name == "source":
        good, expected = value in SOURCES, '"host", "file" or "compute"'
    elif name == "placed":
        good, expected = isinstance(value, bool), "true or false"
    elif name == "seconds":
        good, expected = number(value) and value >= 0, "a number >= 0"
    elif name == "distance":
        good = whole(value) and 1 <= value <= header.layers
        expected = f"a whole number from 1 to {header.layers}"
    else:
        least = 1 if name == "tokens" else 0
        good, expected = whole(value) and value >= least, f"a whole number >= {least}"
    if not good:
        raise ValueError(expected)
    return value


def check_names(content: dict[str, Any], expected: list[str], what: str) -> None:
    if missing := [name for name in expected if name not in content and name not in ADDED]:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    if unknown := [name for name in content if name not in expected]:
        raise ValueError(f"{what} has the unknown {some(unknown)}")


def require(holds: bool, name: str, content: dict[str, Any], expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {quoted(content[name])}, and must be {expected}")


def whole(value: object) -> bool:
    """Whether this is a whole number that a float can represent exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def number(value: object) -> bool:
    return whole(value) or (isinstance(value, float) and abs(value) <= MAX_NUMBER)
