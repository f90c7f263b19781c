"""Starts ranks, each with files of its own for what it prints, and says how each of them ended.

A rank is started by a shell script that notes its process and its exit status, since torchrun tells neither.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dev.harness.ranks.namespaces import Machines

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PORT = 29477  # free, since a namespace has no other programs
# Signals that torchrun sends to all of a rank's processes must not end the script before it has the status.
SCRIPT = """cd {here}
trap : INT TERM HUP QUIT
sh -c 'echo $$ > pid.{rank}; exec "$@" < {stdin} > {stdout} 2> err.{rank}' sh {command}
status=$?
echo $status > status.new.{rank}; mv status.new.{rank} status.{rank}
exit $status
"""


@dataclass(frozen=True)
class Way:
    """A way to start ranks."""

    name: str
    apart: bool = False  # each rank is on a machine of its own, which is a network namespace
    torchrun: bool = False  # one of them, or one on each machine


WAYS = (
    Way("torchrun", torchrun=True),
    Way("by hand"),
    Way("by hand, apart", apart=True),
    Way("torchrun, apart", apart=True, torchrun=True),
)


class Ranks:
    """Ranks that were started. `commands` has that of each; None is a rank that is not started."""

    def __init__(
        self,
        commands: Sequence[Sequence[str] | None],
        way: Way,
        folder: Path,
        machines: Machines | None = None,
        terminal: str | None = None,
        shown: bool = False,
    ) -> None:
        """Rank 0 reads from the `terminal` if there is one, and writes there too if it is `shown`. Everything
        else goes to files in the folder, which is made here. `machines` are needed where ranks are apart."""
        self.size, self.way, self.folder, self.machines = len(commands), way, folder, machines
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.began = time.monotonic()
        for rank, command in enumerate(commands):
            self.write_script(rank, command, terminal if rank == 0 else None, shown)
        if way.torchrun:
            launchers = self.torchruns(machines)
        else:
            launchers = self.by_hand([command is not None for command in commands], machines)
        self.launchers = launchers

    def write_script(
        self, rank: int, command: Sequence[str] | None, terminal: str | None, shown: bool
    ) -> None:
        script = SCRIPT.format(
            here=shlex.quote(str(self.folder)),
            rank=rank,
            command=shlex.join(command or ("sleep", "600")),
            stdin=terminal or "/dev/null",
            stdout=terminal if terminal and shown else f"out.{rank}",
        )
        self.path("rank", rank).write_text(script)

    def path(self, kind: str, rank: int) -> Path:
        return self.folder / f"{kind}.{rank}"

    def by_hand(self, there: Sequence[bool], machines: Machines | None) -> list[subprocess.Popen[bytes]]:
        address = machines.addresses[0] if machines else "127.0.0.1"
        place = {"MASTER_ADDR": address, "MASTER_PORT": str(PORT if machines else free_port())}
        started = []
        for rank in (rank for rank in range(self.size) if there[rank]):
            local, ranks_here = (0, 1) if machines else (rank, self.size)
            numbers = {
                "RANK": rank,
                "WORLD_SIZE": self.size,
                "LOCAL_RANK": local,
                "LOCAL_WORLD_SIZE": ranks_here,
            }
            inside = machines.inside(rank) if machines else []
            environment = place | {name: str(number) for name, number in numbers.items()}
            started.append(self.start([*inside, "sh", str(self.path("rank", rank))], environment))
        return started

    def torchruns(self, machines: Machines | None) -> list[subprocess.Popen[bytes]]:
        command = ["--no-python", "sh", "-c", f'exec sh "{self.folder}/rank.$RANK"']
        if not machines:
            numbers = ["--nproc-per-node", str(self.size), "--master-port", str(free_port())]
            return [self.start([*TORCHRUN, *numbers, *command], {})]
        started = []
        for node in range(self.size):
            numbers = ["--nproc-per-node", "1", "--nnodes", str(self.size), "--node-rank", str(node)]
            numbers += ["--master-addr", machines.addresses[0], "--master-port", str(PORT)]
            started.append(self.start([*machines.inside(node), *TORCHRUN, *numbers, *command], {}))
        return started

    def start(self, command: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        fixed = {"TMPDIR": str(self.temporary), "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
        environment = os.environ | fixed | {"OMP_NUM_THREADS": "1"} | variables
        with (self.folder / "launchers").open("ab") as said:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )

    def pid(self, rank: int) -> int | None:
        """The rank's process; None if it has not begun."""
        text = self.read("pid", rank)
        return int(text) if text.endswith("\n") else None

    def status(self, rank: int) -> int | None:
        """The exit status, which is 128 more than the signal that ended it; None if it has not ended."""
        text = self.read("status", rank)
        return int(text) if text else None

    def out(self, rank: int) -> str:
        return self.read("out", rank)

    def err(self, rank: int) -> str:
        return self.read("err", rank)

    def read(self, kind: str, rank: int) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.path(kind, rank).read_bytes().decode("utf-8", "replace")
        return ""

    def when(self, kind: str, rank: int) -> float:
        """When a file was written that is there, as `time.time` counts."""
        return self.path(kind, rank).stat().st_mtime

    def send(self, rank: int, number: signal.Signals) -> bool:
        """Whether the rank was there to get the signal."""
        pid = self.pid(rank)
        if pid is None or self.status(rank) is not None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def send_to_launchers(self, number: signal.Signals) -> bool:
        """Send a signal to all that started ranks. Returns whether any of it was there to get it."""
        there = [launcher for launcher in self.launchers if launcher.poll() is None]
        for launcher in there:
            launcher.send_signal(number)
        return bool(there)

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until something is true. Returns whether it became true within these seconds."""
        end = time.monotonic() + seconds
        while not (found := done()) and time.monotonic() < end:
            time.sleep(0.005)
        return found

    def launched_end(self, seconds: float) -> bool:
        """Whether all that started ranks has ended within so many seconds."""
        return self.wait(lambda: all(launcher.poll() is not None for launcher in self.launchers), seconds)

    def end(self) -> None:
        """End everything in any case."""
        for launcher in self.launchers:
            launcher.kill()
        for rank in range(self.size):
            self.send(rank, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
