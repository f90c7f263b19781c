"""Machines that are network namespaces, joined by a bridge in one more, so that one can lose its network.

A link that is set down says nothing to anyone: no FIN arrives, as when a cable is pulled. It takes root and
`ip`; nothing of it is in the network of the machine itself.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PREFIX = "mixtral-cuts-"
NETS = Path("/run/netns")


@contextmanager
def machines(count: int) -> Iterator["Machines"]:
    """Inside, there are so many machines. Raises `subprocess.CalledProcessError` where it is not allowed."""
    made = Machines(count)
    try:
        made.join()
        yield made
    finally:
        made.remove()


class Machines:
    """Machine n has the address `addresses[n]`, and commands run in it that begin with `inside(n)`."""

    def __init__(self, count: int) -> None:
        name = f"{PREFIX}{os.getpid()}-"
        self.switch, self.names = name + "switch", [name + str(number) for number in range(count)]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]

    def join(self) -> None:
        for name in (self.switch, *self.names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.switch, "link", "add", "name", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            words = ["type", "veth", "peer", "name", "eth0", "netns", name]
            ip("-n", self.switch, "link", "add", "name", f"port{number}", *words)
            ip("-n", self.switch, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{self.addresses[number]}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def inside(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[number]]

    def cut(self, number: int, outside: bool) -> None:
        """Take the network from a machine: its own link goes down, or, `outside`, the bridge's one to it."""
        name, link = (self.switch, f"port{number}") if outside else (self.names[number], "eth0")
        ip("-n", name, "link", "set", link, "down")

    def remove(self) -> None:
        for name in present(self.switch.removesuffix("switch")):
            ip("netns", "delete", name)


def present(prefix: str = PREFIX) -> list[str]:
    """The namespaces that are there with names that begin so."""
    return sorted(name for name in os.listdir(NETS) if name.startswith(prefix)) if NETS.is_dir() else []


def remove_abandoned() -> None:
    """Remove what processes have left that were killed."""
    for name in present():
        if not Path("/proc", name.removeprefix(PREFIX).split("-")[0]).exists():
            ip("netns", "delete", name)


def why_not() -> str:
    """Why this machine allows no namespaces; empty if it does."""
    try:
        remove_abandoned()
        with machines(1):
            return ""
    except FileNotFoundError:
        return "there is no command `ip`"
    except subprocess.CalledProcessError as error:
        return str(error.stderr).strip().rpartition("\n")[2] or f"`ip` ends with {error.returncode}"


def ip(*words: str) -> None:
    arguments: Sequence[str] = ("ip", *words)
    subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=30)
