"""The processes of one way to compute: an engine by itself, or one process for each rank."""

import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dev.peers.llamacpp.sides import Side

RANK_SIDE = "dev.bench.ranks_side"


@dataclass(frozen=True)
class Way:
    """Several processes of several threads each. `depth` limits the passes under way at once."""

    name: str
    ranks: int
    threads: int
    depth: int | None = None


def start_ranks(module: str, count: int, stack: ExitStack) -> list[Side]:
    """Processes with the variables that torchrun sets, by rank. The stack ends them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    variables = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    sides = []
    for rank in range(count):
        own = variables | {"RANK": rank, "LOCAL_RANK": rank}
        words = ("env", *(f"{name}={value}" for name, value in own.items()))
        sides.append(stack.enter_context(Side(module, prefix=words)))
    return sides


class Crew:
    """A way's processes, which answer as one. They wait while others are asked."""

    def __init__(self, way: Way, path: str, stack: ExitStack, **options: Any) -> None:
        """Start the processes and load the model at `path` with such engine options."""
        self.way, self.sides = way, start_ranks(RANK_SIDE, way.ranks, stack)
        self.before = [side.ask("memory") for side in self.sides]  # of libraries, above all
        given = options | {"path": path, "threads": way.threads, "distributed": way.ranks > 1}
        for rank in reversed(range(way.ranks)):  # rank 0 last, which waits for the others
            self.about = self.sides[rank].ask("load", rank=rank, **given)
        self.idle = self.rested = 0.0  # seconds of processors and of waiting, between two questions
        self.last = time.perf_counter(), self.spent()

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """Rank 0's answer, with the processor time of all ranks as `cpu_seconds`, and as `timed` the seconds
        that rank 0 waited for the others and that each other rank computed."""
        began, before = time.perf_counter(), self.spent()
        since, spent = self.last
        self.idle += total(before) - total(spent)
        self.rested += began - since
        found = self.sides[0].ask(do, **given)
        after = self.spent()
        self.last = time.perf_counter(), after
        timed = [late["timed"] - early["timed"] for early, late in zip(before, after, strict=True)]
        return found | {"cpu_seconds": total(after) - total(before), "timed": timed}

    def spent(self) -> list[dict[str, float]]:
        return [side.ask("spent") for side in self.sides]

    def memory(self) -> list[dict[str, Any]]:
        """Each rank's memory now, in MB over what it had before loading."""
        rows = []
        for rank, (side, before) in enumerate(zip(self.sides, self.before, strict=True)):
            now = side.ask("memory")
            sizes = {name: (now[name] - before[name]) / 1e6 for name in ("anonymous", "mapped")}
            rows.append({"way": self.way.name, "rank": rank} | sizes | {"resident": now["rss"] / 1e6})
        return rows

    @property
    def idle_share(self) -> float:
        """Processors that the way kept busy while others were asked."""
        return self.idle / self.rested if self.rested else 0.0


def total(spent: Sequence[dict[str, float]]) -> float:
    return sum(of_rank["processor"] for of_rank in spent)
