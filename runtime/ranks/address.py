"""Under which address other ranks reach this machine, and what the machine is called."""

import socket
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import DeviceError

LOOPBACK = "127.0.0.1"
BOOT = Path("/proc/sys/kernel/random/boot_id")


def local_address(target: str, port: int) -> str:
    """The numeric address of this machine from which packets to `target` leave. None are sent.

    It is a loopback address if `target` is a name or an address of this machine's own that means itself.
    Raises `OSError` if there is no way to `target`.
    """
    family, kind, _, _, place = socket.getaddrinfo(target, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def remote_address(target: str, port: int) -> str:
    """The numeric address that `target` means on this machine. Raises `OSError`."""
    return str(socket.getaddrinfo(target, port, type=socket.SOCK_DGRAM)[0][4][0])


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface. Raises `DeviceError` if it has none."""
    import fcntl

    code = 0xC0206921 if sys.platform == "darwin" else 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), code, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            names = ", ".join(found for _, found in socket.if_nameindex())
            raise DeviceError(
                f"GLOO_SOCKET_IFNAME={name!r}: no interface of that name has an IPv4 address; "
                f"this machine has {names}"
            ) from error
    return socket.inet_ntoa(answer[20:24])


def is_loopback(address: str) -> bool:
    """
    >>> is_loopback("127.0.1.1"), is_loopback("::1"), is_loopback("10.0.0.1")
    (True, True, False)
    """
    return address.startswith("127.") or address == "::1"


def is_ours(address: str) -> bool:
    """Whether this machine has the numeric address."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def reachable(own: str, machine: str, machines: Sequence[str], seen: Sequence[str]) -> str:
    """The address that the other ranks can reach, for a rank on `machine` with the local address `own`.

    The host of the store often knows its own name as a loopback address, which is of no use to others. Then
    it is one of the addresses under which ranks of other machines, by rank, have `seen` the store.
    """
    if not is_loopback(own) or len(set(machines)) == 1:
        return own
    found = [via for via, of in zip(seen, machines, strict=True) if of != machine and not is_loopback(via)]
    return next((via for via in found if is_ours(via)), own)


def boot() -> str:
    """Tells machines of the same name apart. Empty where the system has no such thing."""
    try:
        return BOOT.read_text("ascii").strip()
    except OSError:
        return ""


def machine_names(hosts: Sequence[str], boots: Sequence[str]) -> list[str]:
    """A name for each rank's machine: its host name, with a number where another machine has the same.

    >>> machine_names(["a", "b", "a", "a"], ["1", "2", "3", "1"])
    ['a', 'b', 'a#2', 'a']
    """
    names: dict[tuple[str, str], str] = {}
    seen: Counter[str] = Counter()
    for host, of in zip(hosts, boots, strict=True):
        if (host, of) not in names:
            seen[host] += 1
            names[host, of] = host if seen[host] == 1 else f"{host}#{seen[host]}"
    return [names[host, of] for host, of in zip(hosts, boots, strict=True)]
