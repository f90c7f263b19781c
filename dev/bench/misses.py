"""Missed experts copied, computed on the CPU, or divided between both: decoding one text in each way.

    resident     nothing is missed: what computing alone takes
    copy         missed experts are copied to the device
    compute      the CPU computes them where they lie
    auto         both, by the rule of `runtime.experts.split`

All ways take turns with the same ids, at links that are 1/2, 1/4 and 1/8 as fast as the CPU computes experts.

A CPU stands in for a GPU. The "device" is the calling thread, which computes trunk and hits, and the CPU that
computes misses is one more thread. What that cannot show: a GPU takes a fraction of the CPU's time for an
expert, so there hits cost next to nothing, and a layer waits for the slower of link and CPU alone. Here the
device is as slow as the CPU, and both share the memory with the copies.

The bound is a token's least time with the misses that "copy" has. Of its three terms the largest counts:

    the device computes the trunk, and then device and CPU all experts, at the rate that they reach together
    link and CPU, both busy all the time, bring or compute the missed ones (the link also during the trunk)
    the device computes the trunk and the hits

It knows nothing of layers that come one after the other, nor that nobody
knows ahead which experts will be missed. `of_better` is a way's speed over that of the better of copy and
compute.

`differences` are the largest of a logit from "copy", in units of the logits' deviation. For these a device
that rounds no activations stands in. With the CPU's own kernels, two experts a token give the same bits.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dev.bench.tiers import PROMPT, Way, subject
from model.checkpoint import Checkpoint, open_checkpoint
from model.kv_cache import KVCache
from model.quant.backends.blocks import Blocks
from model.quant.expert import ExpertFormat
from model.target import Target
from runtime.errors import OptionError
from runtime.experts.cache import ExpertCache
from runtime.experts.host import Job
from runtime.experts.link import HostLink
from runtime.experts.rates import divide_misses, measure
from runtime.experts.split import Split
from runtime.experts.store import Loan
from runtime.experts.tickets import Ticket
from runtime.options import DTYPES, EngineOptions
from runtime.planning.planner import plan_checkpoint
from runtime.process.threads import using_threads
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from runtime.startup import load_weights
from runtime.stats import Stats
from tools.bench.figures import median_seconds
from tools.bench.stage import Player, random_ids

LINKS = (2, 4, 8)  # how many experts the CPU computes while the link carries one
WAYS = ("copy", "compute", "auto")
WARM_UP = 24  # tokens before the first that counts, so that slots hold what they hold in a long text
ALONE = 0.5  # seconds of measuring what an expert takes on the device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="a checkpoint that tools.quantize wrote (default: a random one of 0.8 GB)"
    )
    parser.add_argument("--folder", type=Path, help="where the random one is kept for the next time")
    parser.add_argument("--slots", type=at_least_one, help="of each layer (default: half of its experts)")
    parser.add_argument("--lookahead", type=int, default=2, help="layers ahead to guess for (default: 2)")
    parser.add_argument("--dtype", choices=DTYPES, help="what to compute in (default: the engine's)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="of device and CPU each (default: 1)")
    parser.add_argument("--tokens", type=at_least_one, default=24, help="per turn (default: 24)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="turns of each way (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per turn on stderr. Returns all figures."""
    with subject(args) as folder, using_threads(args.threads), ExitStack() as stack:
        stage = Stage(open_checkpoint(folder), args, stack)
        about = {"checkpoint": stage.checkpoint.description, "threads_each": args.threads}
        return about | stage.describe() | {"ways": [row for times in LINKS for row in stage.measure(times)]}


@dataclass(frozen=True)
class Rates:
    """Seconds: of an expert on link, CPU and device, of one where device and CPU both compute, and of a
    token's trunk."""

    link: float
    cpu: float
    device: float
    together: float
    trunk: float

    def bound(self, hits: float, misses: float) -> float:
        """The shortest time of a token with this many hits and misses, in seconds.

        >>> rates = Rates(link=4.0, cpu=1.0, device=0.5, together=0.375, trunk=0.0)
        >>> rates.bound(hits=9, misses=1), rates.bound(hits=0, misses=5), rates.bound(hits=0, misses=0)
        (4.5, 4.0, 0.0)
        """
        both = self.trunk + (hits + misses) * self.together
        brought = (misses + self.trunk / self.cpu) / (1 / self.cpu + 1 / self.link) if misses else 0.0
        return max(both, brought, self.trunk + hits * self.device)


class Stage:
    """All ways over one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, args: argparse.Namespace, stack: ExitStack) -> None:
        self.checkpoint, self.stack, self.tokens, config = checkpoint, stack, args.tokens, checkpoint.config
        context = PROMPT + WARM_UP + args.tokens * args.repeats
        if context > config.context:
            raise OptionError(
                f"{args.repeats} turns of {args.tokens} tokens do not fit the model's context of "
                f"{config.context}; take fewer"
            )
        ids = random_ids(config, context)
        self.prompt, text = ids[:, :PROMPT], ids[0, PROMPT:].tolist()
        self.warm_up, rest = text[:WARM_UP], text[WARM_UP:]
        self.texts = [rest[i : i + args.tokens] for i in range(0, len(rest), args.tokens)]
        self.given: dict[str, Any] = {
            "device": "cpu", "dtype": args.dtype, "context": context, "lookahead": args.lookahead,
        }  # fmt: skip
        self.resident = self.open(offload="never")
        self.given |= {"offload": "always", "slots": args.slots or config.experts // 2}
        self.ways = {name: self.open(misses=name) for name in WAYS}
        cache = self.cache("auto")
        self.size, self.x = cache.store.size, torch.ones(1, config.hidden, dtype=self.resident.plan.dtype)
        for _ in range(2):  # again beside a slow link, which leaves the CPU more of the memory
            self.cpu = measure(cache, self.x)[1]  # GB/s
            cache.copies.link = HostLink(self.cpu / LINKS[0] * 1e9)  # it is idle now
        on_device = [partial(expert, self.x) for expert in cache.bound]
        self.device, self.together = seconds_alone(on_device), seconds_together(on_device, cache, self.x)
        self.begin(self.resident)
        computing = median_seconds([self.resident.turn(text)[0] for text in self.texts]) / self.tokens
        self.computing = computing
        self.trunk = max(computing - config.layers * config.experts_per_token * self.device, 0.0)

    def open(self, reference: bool = False, **options: Any) -> Way:
        """Load the model. If `reference`, the device's experts round no activations."""
        engine_options, config = EngineOptions(**self.given | options), self.checkpoint.config
        plan = plan_checkpoint(self.checkpoint, engine_options)
        form = ExpertFormat.of(config, self.checkpoint.formats.experts, plan.dtype, Target.of(plan.device))
        on_device = replace(form, backends=dict.fromkeys(form.backends, Blocks)) if reference else form
        model, cache, files = load_weights(self.checkpoint, plan, engine_options, on_device)
        for made in (files, cache):
            if made:
                self.stack.callback(made.close)
        if cache and engine_options.misses != "copy":
            divide_misses(cache, plan, engine_options)
            assert cache.exchange is not None
            cache.exchange.host.form = form
            cache.exchange.host.bound.clear()
        kv = KVCache.allocate(config, 1, plan.context, plan.dtype, plan.device, plan.kv)
        return Way(engine_options.misses, plan, Player(model, kv, plan.chunk, None), cache)

    def cache(self, name: str) -> ExpertCache:
        cache = self.ways[name].cache
        assert cache is not None
        return cache

    def begin(self, way: Way) -> Tensor:
        """Read the prompt and some of the text with empty slots. Returns logits of the latter, [T, V]."""
        way.turns.clear()
        if way.cache:
            way.cache.residency.forget()
        way.player.kv.truncate(0)
        way.player.prompt(self.prompt)
        model, kv = way.player.model, way.player.kv
        with torch.inference_mode():
            rows = [model(torch.tensor([[i]]), kv, last=True)[0, 0].float() for i in self.warm_up]
        return torch.stack(rows)

    def differences(self) -> dict[str, float]:
        """The largest difference of each way's logits from those of "copy", in units of their deviation."""
        logits = {}
        for name in WAYS:
            way = self.open(True, misses=name)
            if way.cache and way.cache.residency.split:
                way.cache.residency.split = Split(2.0, 1.0, demand=name == "auto")
            logits[name] = self.begin(way)
        like = logits["copy"]
        return {name: float((found - like).abs().max() / like.std()) for name, found in logits.items()}

    def describe(self) -> dict[str, Any]:
        return {
            "slots": list(self.ways["copy"].plan.slots_per_layer),
            "expert_bytes": self.size,
            "cpu_gb_per_s": self.cpu,
            "device_gb_per_s": self.size / self.device / 1e9,
            "together_gb_per_s": self.size / self.together / 1e9,
            "computing_ms": self.computing * 1e3,
            "trunk_ms": self.trunk * 1e3,
            "differences": self.differences(),
        }

    def measure(self, times: int) -> list[dict[str, Any]]:
        """A row for each way. All take turns, over a link on which an expert takes `times` as long as on the
        CPU."""
        for way in self.ways.values():
            assert way.cache is not None
            way.cache.copies.link = HostLink(self.cpu / times * 1e9)  # it is idle now
        link, cpu = measure(self.cache("auto"), self.x)  # GB/s, of one while the other works
        rates = Rates(self.size / link / 1e9, self.size / cpu / 1e9, self.device, self.together, self.trunk)
        for name in ("compute", "auto"):
            self.cache(name).residency.split = Split(rates.link, rates.cpu, demand=name == "auto")
        for way in self.ways.values():
            self.begin(way)
        for repeat, text in enumerate(self.texts, start=1):
            for way in self.ways.values():
                way.turns.append(way.turn(text)[0])
            shown = ", ".join(f"{n} {self.tokens / w.turns[-1].seconds:.2f}" for n, w in self.ways.items())
            say(f"1/{times}, {repeat} of {len(self.texts)}: {shown} tokens/s")
        counted = sum((turn.counted for turn in self.ways["copy"].turns), Stats())
        tokens = len(self.texts) * self.tokens
        bound = rates.bound(counted.hits / tokens, counted.misses / tokens)
        seconds = {name: median_seconds(way.turns) / self.tokens for name, way in self.ways.items()}
        better = min(seconds["copy"], seconds["compute"])
        return [
            {
                "link": f"1/{times}",
                "way": name,
                "link_gb_per_s": link,
                "cpu_gb_per_s": cpu,
                "bound_ms": bound * 1e3,
                "tokens_per_s": 1 / taken,
                "share_of_bound": bound / taken,
                "of_better": better / taken,
            }
            | self.count(self.ways[name])
            for name, taken in seconds.items()
        ]

    def count(self, way: Way) -> dict[str, float]:
        """What became of experts, per token."""
        total, tokens = sum((turn.counted for turn in way.turns), Stats()), len(way.turns) * self.tokens
        return {
            "hit_ratio": total.hit_ratio,
            "computed": total.computed / tokens,
            "copied": total.copied_bytes / self.size / tokens,
            "guesses": total.guesses / tokens,
            "used_guesses": total.used_guesses / tokens,
            "stalled_ms": total.stall_seconds / tokens * 1e3,
        }


def seconds_alone(works: Sequence[Callable[[], object]]) -> float:
    """Of one of these works, if nothing else happens."""
    chance, done, start = random.Random(0), 0, time.perf_counter()
    with torch.inference_mode():
        while (passed := time.perf_counter() - start) < ALONE:
            chance.choice(works)()
            done += 1
    return passed / done


def seconds_together(works: Sequence[Callable[[], object]], cache: ExpertCache, x: Tensor) -> float:
    """Of one of these works or of an expert that the CPU computes, while both go on. They share the memory,
    so this is more than what each alone would suggest."""
    assert cache.exchange is not None
    host, chance, done = cache.exchange.host, random.Random(0), 0
    memories = [cache.store.memory(key) for key in cache.store.berths.where]

    def begin() -> Job:
        memory = chance.choice(memories)
        loan = Loan(0, memory, None, Ticket(memory, memory, demand=True))
        return host.begin([loan], x, [0], torch.ones(1, 1))

    job, start = begin(), time.perf_counter()
    with torch.inference_mode():
        while (passed := time.perf_counter() - start) < ALONE:
            chance.choice(works)()
            done += 1
            if job.result is not None:
                job, done = begin(), done + 1
    host.wait(job)
    return passed / done
