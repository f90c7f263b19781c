"""What all ways do in turn, and how they compare."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dev.bench.ranks_way import Crew, Way
from dev.peers.llamacpp.turns import median, quartiles
from runtime.shell.command import say

PROMPT = 16  # tokens before those that are decoded
DECODE, ONE = "decode one text", "prompt of 1 chunk"


class Works:
    """The answers of all ways to the same questions, round by round."""

    def __init__(
        self, kind: str, ways: Sequence[Way], crews: Mapping[str, Crew], args: argparse.Namespace
    ) -> None:
        """`ways` that are the same ranks with fewer or more passes under way have the same crew."""
        self.kind, self.crews, self.args = kind, crews, args
        self.chunk = next(iter(crews.values())).about["chunk"]
        self.same = True  # all ways have chosen the same ids
        self.long, self.together = f"prompt of {args.long} chunks", f"{args.texts} texts together"
        plain = [way for way in ways if way.depth is None]
        several = [way for way in ways if way.ranks * way.threads > 1]  # with one, all is computed in turn
        self.ways = {DECODE: plain, ONE: plain, self.long: several, self.together: list(ways)}
        if kind != "resident":
            del self.ways[ONE]
        self.answers: dict[tuple[str, str], list[dict[str, Any]]] = {
            (work, way.name): [] for work, its in self.ways.items() for way in its
        }

    @staticmethod
    def context(long: int, tokens: int) -> int:
        """The context that these works need. The long prompt has this number of tokens."""
        return max(long, PROMPT + 3 * tokens + 64)

    def rounds(self, deadline: float) -> Iterator[int]:
        """Do all works in all ways, and yield after each round. None but the first begins after the
        `deadline`, of `time.monotonic()`."""
        for number in range(self.args.rounds):
            if number and time.monotonic() > deadline:
                say(f"{self.kind}: no time for round {number + 1}")
                return
            for work, ways in self.ways.items():
                for way in ways:
                    self.answers[work, way.name].append(self.take(work, way, seed=100 * (number + 1)))
                self.compare(work, ways)
            yield number

    def take(self, work: str, way: Way, seed: int) -> dict[str, Any]:
        """One way's turn. The answer tells how many `tokens` it was."""
        crew, args = self.crews[way.name], self.args
        crew.ask("limit", depth=way.depth)
        if work == self.together:
            most = 3 * args.tokens + 32  # while other prompts are computed, the first texts go on
            crew.ask("seat", texts=args.texts, prompt=PROMPT, tokens=most, seed=seed)
            found = crew.ask("write", tokens=args.texts * args.tokens)
            crew.ask("leave")
            return found
        if work == DECODE:
            crew.ask("prompt", tokens=PROMPT, seed=seed)
            return {"tokens": args.tokens} | crew.ask("decode", tokens=args.tokens, seed=seed)
        tokens = self.chunk * (1 if work == ONE else args.long)
        return {"tokens": tokens} | crew.ask("prompt", tokens=tokens, seed=seed)

    def compare(self, work: str, ways: Sequence[Way]) -> None:
        """Look at the round's ids, and tell its speeds."""
        last = {way.name: self.answers[work, way.name][-1] for way in ways}
        chosen = [found["ids"] for found in last.values() if "ids" in found]
        self.same &= all(ids == chosen[0] for ids in chosen)
        shown = ", ".join(f"{name} {found['tokens'] / found['seconds']:,.1f}" for name, found in last.items())
        say(f"{self.kind}, {work}: {shown} tokens/s")

    def decoded(self, way: Way) -> list[dict[str, Any]]:
        return self.answers[DECODE, way.name]

    def speeds(self, threads: Way, ranks: Way) -> list[dict[str, Any]]:
        """A row for each work and way, which are compared with the two given."""
        rows = []
        for (work, name), found in self.answers.items():
            low, middle, high = quartiles(speeds(found))
            row: dict[str, Any] = {"experts": self.kind, "work": work, "way": name}
            row |= {"tokens_per_s": middle, "low": low, "high": high}
            row["cpu_ms"] = median(found, "cpu_seconds") / median(found, "tokens") * 1e3
            row["hit_ratio"] = median(found, "hit_ratio") if work == self.together else None
            row |= over("of_threads", found, self.answers[work, threads.name])
            one = [way.name for way in self.ways[work] if way.depth == 1]
            alone = self.answers[work, one[0]] if one and self.crews[name].way == ranks else None
            rows.append(row | over("of_one_under_way", found, alone))
        return rows


def speeds(found: Sequence[Mapping[str, Any]]) -> list[float]:
    return [answer["tokens"] / answer["seconds"] for answer in found]


def over(
    name: str, found: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """The quartiles of the rounds' own ratios of speed."""
    if other is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, middle, high = quartiles([a / b for a, b in zip(speeds(found), speeds(other), strict=True)])
    return {name: middle, f"{name}_low": low, f"{name}_high": high}
