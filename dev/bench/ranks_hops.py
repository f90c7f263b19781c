"""What a frame's way from one rank to the next takes, beside the same bytes by torch.distributed's gloo."""

from contextlib import ExitStack
from typing import Any

from dev.bench.ranks_way import start_ranks, total
from dev.peers.llamacpp.sides import Side
from dev.peers.llamacpp.turns import quartiles
from runtime.shell.command import say

HOP_SIDE = "dev.bench.ranks_hop_side"
ROW = 8192  # bytes of Mixtral-8x7B's hidden state of a token in 16 bits
SIZES = {64: 300, ROW: 300, 512 * ROW: 10}  # bytes, and how many of them go to and fro in a turn
HOWS = ("ring", "gloo")


def measure_hops(rounds: int) -> list[dict[str, Any]]:
    """A row for each size: microseconds of a hop and processor time of both ranks, medians of all messages.
    Ring and gloo take turns."""
    with ExitStack() as stack:
        sides = start_ranks(HOP_SIDE, 2, stack)
        for rank in (1, 0):
            sides[rank].ask("meet", rank=rank)
        found = {(size, how): Hop() for size in SIZES for how in HOWS}
        for size, count in SIZES.items():
            for how in HOWS:  # the first ones make connections
                Hop().take(sides, how, size, min(count, 20))
        for _ in range(rounds):
            for (size, how), hop in found.items():
                hop.take(sides, how, size, SIZES[size])
    rows = [
        {"bytes": size, **found[size, "ring"].figures("ring"), **found[size, "gloo"].figures("gloo")}
        for size in SIZES
    ]
    for row in rows:
        say(f"a hop of {row['bytes']:,} bytes: {row['ring_us']:,.0f} us, by gloo alone {row['gloo_us']:,.0f}")
    return rows


class Hop:
    """Messages of one size by one way."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.processor = 0.0

    def take(self, sides: list[Side], how: str, size: int, count: int) -> None:
        before = total([side.ask("spent") for side in sides])
        sides[1].ask("echo", how=how, size=size, count=count)
        self.times += sides[0].ask("bounce", how=how, size=size, count=count)["times"]
        self.processor += total([side.ask("spent") for side in sides]) - before

    def figures(self, how: str) -> dict[str, float]:
        low, middle, high = quartiles([1e6 * seconds for seconds in self.times])
        cpu = self.processor / len(self.times) / 2 * 1e6
        return {f"{how}_us": middle, f"{how}_low": low, f"{how}_high": high, f"{how}_cpu_us": cpu}
