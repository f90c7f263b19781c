"""Where the server listens, and who can reach it there."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import warnings

from model.errors import quoted
from runtime.errors import OptionError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, which takes no connections before `listen`.

    Raises `OptionError` if there is no such address, and `OSError` if the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise OptionError(f"--host {quoted(host)}: this machine has no such address") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and ipaddress.ip_address(address[0]).is_unspecified:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise OptionError(f"--host {quoted(host)}: this machine has no such address") from None
        number = error.errno or 0
        raise OSError(number, os.strerror(number), f"{host}:{port}") from None
    return made


def url(listening: socket.socket) -> str:
    """The address that a browser on this machine takes."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def check_exposed(listening: socket.socket, has_keys: bool) -> None:
    """Warns if everybody who reaches this machine may ask."""
    if not is_loopback(listening) and not has_keys:
        warnings.warn(
            f"everybody who reaches {url(listening)} may use the model and read its metrics; give "
            "--api-key-file FILE, or listen on 127.0.0.1",
            RuntimeWarning,
            stacklevel=2,
        )


def names(listening: socket.socket) -> frozenset[str] | None:
    """The names by which a server may be called that has no keys: see `Guard.hosts`. None allows any."""
    return LOOPBACK | {listening.getsockname()[0]} if is_loopback(listening) else None
