"""A TCP connection between any two ranks, made once through the store. Beats and a few words go over them.

The system closes a dead process's connections, so all others learn of its death at once, whoever hosts the
store. Python's sockets can be waited for with a limit, which the store's client cannot.
"""

import json
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import DeviceError
from runtime.ranks.address import boot, machine_names, reachable
from runtime.ranks.deadline import Deadline

POLL = 0.02  # seconds between two looks at the store
GREETING = 1.0  # seconds that a connection may take to say who it is


@dataclass(frozen=True)
class Place:
    """Where a rank is, as far as it knows itself."""

    host: str  # the machine's name
    address: str  # numeric, of this machine
    seen: str  # the numeric address under which it sees the store


@dataclass(frozen=True)
class Links:
    """What a rank has after the ranks have met."""

    sockets: dict[int, socket.socket]  # by rank, of all others; they do not block
    hosts: tuple[str, ...]  # the machines' names, by rank; two machines have two names
    address: str  # this rank's own, numeric, that the others can reach
    timeout: float  # seconds of silence after which the least patient rank takes another for lost


def connect(store: Any, rank: int, size: int, place: Place, timeout: float, deadline: Deadline) -> Links:
    """Meet the other ranks. `store` is for this meeting alone.

    Blocks until all have come, or until the deadline. Raises `DeviceError`.
    """
    own: dict[str, Any] = {"host": place.host, "boot": boot(), "address": place.address, "seen": place.seen}
    own["timeout"] = timeout
    told = exchange(store, "who", own, rank, size, deadline)
    hosts = machine_names([record["host"] for record in told], [record["boot"] for record in told])
    address = reachable(place.address, hosts[rank], hosts, [record["seen"] for record in told])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sockets: dict[int, socket.socket] = {}
    with socket.create_server((address, 0), family=family, backlog=size) as server:
        own = {"address": address, "port": server.getsockname()[1], "token": secrets.token_hex(16)}
        places = exchange(store, "where", own, rank, size, deadline)
        try:
            for other in range(rank):
                sockets[other] = call(places[other], rank, other, hosts[other], deadline)
            while missing := [other for other in range(rank + 1, size) if other not in sockets]:
                accept(server, own["token"], missing, sockets, size, deadline)
        except BaseException:
            for made in sockets.values():
                made.close()
            raise
    for made in sockets.values():
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setblocking(False)
    return Links(sockets, tuple(hosts), address, min(float(record["timeout"]) for record in told))


def exchange(
    store: Any, topic: str, own: dict[str, Any], rank: int, size: int, deadline: Deadline
) -> list[Any]:
    """Every rank's record, by rank. Raises `DeviceError` naming those that have not come."""
    missing = list(range(size))
    try:
        store.set(f"{topic}/{rank}", json.dumps(own))
        while missing := [other for other in missing if not store.check([f"{topic}/{other}"])]:
            if deadline.left < 0:
                raise absent(missing, size)
            time.sleep(POLL)
        return [json.loads(store.get(f"{topic}/{other}")) for other in range(size)]
    except RuntimeError as error:  # its host has given up
        raise DeviceError(
            "the ranks' store has ended before all had met; the output of rank 0 or of torchrun may say why"
        ) from error


def absent(missing: Sequence[int], size: int) -> DeviceError:
    """
    >>> print(absent([1, 2], 3))
    of 3 ranks, 1 and 2 have not come in time; look at their output
    """
    names = " and ".join(map(str, missing)) if len(missing) < 5 else f"{len(missing)} of them"
    have = "has" if len(missing) == 1 else "have"
    return DeviceError(f"of {size} ranks, {names} {have} not come in time; look at their output")


def call(place: dict[str, Any], rank: int, other: int, host: str, deadline: Deadline) -> socket.socket:
    """A connection to a rank that listens at `place`. Raises `DeviceError`."""
    where = place["address"], place["port"]
    try:
        made = socket.create_connection(where, max(deadline.left, GREETING))
        made.sendall(json.dumps({"rank": rank, "token": place["token"]}).encode() + b"\n")
        return made
    except OSError as error:
        raise DeviceError(
            f"rank {rank} cannot reach rank {other} ({host}) at {where[0]}:{where[1]}: "
            f"{error.strerror or error}; open the firewall, or name the interface by GLOO_SOCKET_IFNAME"
        ) from error


def accept(
    server: socket.socket,
    token: str,
    missing: Sequence[int],
    sockets: dict[int, socket.socket],
    size: int,
    deadline: Deadline,
) -> None:
    """Take one connection into `sockets` if it is of a `missing` rank, which knows the token."""
    server.settimeout(max(deadline.left, 0.001))
    try:
        caller, _ = server.accept()
    except TimeoutError:
        raise absent(missing, size) from None
    if (rank := greeting(caller, token)) in missing:
        sockets[rank] = caller
    else:
        caller.close()


def greeting(caller: socket.socket, token: str) -> int:
    """The rank that a new connection claims to be of, and -1 if it does not know the token."""
    caller.settimeout(GREETING)
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 200:
            if not (byte := caller.recv(1)):  # whatever follows the line is the watch's
                return -1
            line += byte
        said = json.loads(line)
        return int(said["rank"]) if secrets.compare_digest(str(said["token"]), token) else -1
    except (OSError, ValueError, TypeError, KeyError):
        return -1
