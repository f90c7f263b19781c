"""Stands in for ranks, without PyTorch: they meet, compare options, write a text, and watch each other.

Rank 0 is connected to each other one. Each `--fault` is a mistake for the harness to find.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

TEXT = "def f(x):\n    return x + 1\n" * 12
FAULTS = (
    "none",
    "deaf",
    "traceback",
    "wrong text",
    "two lines",
    "no line",
    "well",
    "folder",
    "child",
    "agrees",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rank-timeout", "context", "kv", "dtype", "parallel", "rank-layers"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--fault", choices=("none", *FAULTS), default="none")
    args = parser.parse_args()
    try:
        if not Path(args.model).exists() and args.fault != "agrees":
            failure = f"{args.model}: no such folder"
        else:
            failure = ""
        Rank(args, failure).work()
    except KeyboardInterrupt:
        leave("interrupted", 130)


def leave(line: str, status: int) -> NoReturn:
    os.write(2, f"{line}\n".encode() if line else b"")
    os._exit(status)


class Rank:
    def __init__(self, args: argparse.Namespace, failure: str) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.args, self.timeout = args, float(args.rank_timeout or 1)
        self.closing = False
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + self.size
        facts = {name: value for name, value in vars(args).items() if name not in ("chat", "fault")}
        try:
            self.peers = self.met(place)
            told = self.everyone({"failure": failure} | facts)
        except (OSError, ValueError):
            leave(f"error: rank {self.rank} has found no other rank within {self.timeout:g} s", 1)
        for rank, other in enumerate(told):
            if other["failure"]:
                leave(f"error: rank {rank}: {other['failure']}", 1)
            for name in facts if args.fault != "agrees" else ():
                if other[name] != told[0][name]:
                    leave(f"error: --{name}: rank {rank} has {other[name]!r}, rank 0 {told[0][name]!r}", 1)

    def met(self, place: tuple[str, int]) -> dict[int, socket.socket]:
        end = time.monotonic() + self.timeout
        if self.rank:
            while True:
                try:
                    peer = socket.create_connection(place, timeout=self.timeout)
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.02)
            peer.sendall(json.dumps(self.rank).encode() + b"\n")
            return {0: peer}
        if self.size == 1:
            return {}
        while True:  # another program's connection may have the port for a moment
            try:
                server = socket.create_server(("", place[1]))
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        server.settimeout(self.timeout)
        peers = {}
        while len(peers) < self.size - 1:
            peer, _ = server.accept()
            peer.settimeout(self.timeout)
            peers[json.loads(next(lines(peer)))] = peer
        return peers

    def everyone(self, value: dict[str, str]) -> list[dict[str, str]]:
        """What every rank says, by way of rank 0."""
        if self.rank:
            self.peers[0].sendall(json.dumps(value).encode() + b"\n")
            found: list[dict[str, str]] = json.loads(next(lines(self.peers[0])))
            return found
        said = {rank: json.loads(next(lines(peer))) for rank, peer in self.peers.items()} | {0: value}
        found = [said[rank] for rank in range(self.size)]
        for peer in self.peers.values():
            peer.sendall(json.dumps(found).encode() + b"\n")
        return found

    def work(self) -> None:
        for rank, peer in self.peers.items():
            threading.Thread(target=self.listen, args=(rank, peer), daemon=True).start()
        threading.Thread(target=self.beat, daemon=True).start()
        if self.rank:
            while True:
                time.sleep(0.01)
        os.write(2, b"plan: 3 layers\n")
        time.sleep(0.05)
        if self.args.chat:
            while message := self.asked():
                self.write(f"{message.strip()}? {TEXT[:40]}")
        else:
            self.write(TEXT)
        self.closing = True
        for peer in self.peers.values():
            peer.sendall(b"bye\n")
        leave("", 0)

    def asked(self) -> str:
        os.write(2 if not os.isatty(1) else 1, b"> ")
        return sys.stdin.readline()

    def write(self, text: str) -> None:
        for character in text:
            os.write(1, character.encode())
            time.sleep(0.001)
        if os.isatty(1):
            os.write(1, b"\n")

    def beat(self) -> None:
        while not self.closing:
            for rank, peer in self.peers.items():
                try:
                    peer.sendall(b"beat\n")
                except OSError:
                    self.lost(f"the connection to rank {rank} broke")
            time.sleep(self.timeout / 5)

    def listen(self, rank: int, peer: socket.socket) -> None:
        peer.settimeout(self.timeout)
        try:
            for line in lines(peer):
                if line == b"bye":
                    leave("", 0)
                if line != b"beat":
                    self.lost(line.decode())
        except OSError:
            self.lost(f"rank {rank} has not answered for {self.timeout:g} s")
        self.lost(f"rank {rank} has ended")

    def lost(self, line: str) -> None:
        if self.closing or (self.args.fault == "deaf" and self.rank == 1):
            return
        if self.args.fault == "well":
            leave("", 0)
        if self.args.fault == "wrong text" and not self.rank:
            os.write(1, b"!")
        if self.args.fault == "folder":
            tempfile.mkdtemp()
        if self.args.fault == "child":
            subprocess.Popen(["sleep", "60"], start_new_session=True)
        for peer in self.peers.values():
            try:
                peer.sendall(line.encode() + b"\n")
            except OSError:
                continue
        line = f"error: {line}"
        words = {"two lines": f"{line}\n{line}", "no line": ""}
        if self.args.fault == "traceback":
            line = f'Traceback (most recent call last):\n  File "/x/runtime/y.py", line 1\n{line}'
        leave(words.get(self.args.fault, line), 1)


def lines(peer: socket.socket) -> Iterator[bytes]:
    rest = b""
    while more := peer.recv(1):
        rest += more
        if more == b"\n":
            yield rest[:-1]
            rest = b""


if __name__ == "__main__":
    main()
