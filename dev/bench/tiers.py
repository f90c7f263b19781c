"""Less memory than the experts take: decoding one text with all experts in host memory, and with fewer.

    resident     nothing is copied: what computing alone takes
    full         a berth in host memory for every expert
    half         slots and berths together have room for all experts
    quarter      half as many berths, so that experts are read from the file again and again

After "half" and "quarter" comes each once more as "naive": an expert that leaves its slot and has no berth is
dropped instead of written back, and read again when it is needed.

All ways take turns with the same ids, and have to choose the same next ones. A CPU stands in for a GPU:
slots, berths and the link are host memory, and one core is left to the copies. Both directions of the link
and the disk are slowed down to given rates. By default the link is as fast as makes the copies of "full" last
as long as computing, and the disk has a quarter of that.

The bound is that of each way's own bytes. A token takes no less than computing alone, than its missed experts
on the link, and than what was read for it on the disk, whichever is most. `of_full` is the median of the
turns' ratios of speed to "full".
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dev.bench.random_checkpoint import SMALL, random_native
from model.checkpoint import Checkpoint, open_checkpoint
from model.kv_cache import KVCache
from model.quant.expert import ExpertFormat
from model.quant.formats import DEFAULT
from model.target import Target
from runtime.errors import OptionError
from runtime.experts.cache import ExpertCache
from runtime.experts.link import HostLink
from runtime.experts.store import Label, Store
from runtime.experts.tiers import SPARE_BERTHS
from runtime.options import DTYPES, EngineOptions
from runtime.planning.plan import Plan
from runtime.planning.planner import plan_checkpoint
from runtime.process.threads import pick_threads, using_threads
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from runtime.startup import load_weights
from runtime.stats import Stats
from tools.bench.figures import Turn, median_seconds
from tools.bench.stage import Player, random_ids
from tools.quantize.names import CONFIG

SHAPE = dataclasses.replace(SMALL, layers=16)  # experts of 6 MB, 0.8 GB in all
STEADINESS = 8.0  # of the random model's residual stream, on which lookahead depends
PROMPT = 96  # ids before the first turn, which need every expert of every layer
WAYS = ("half", "half, naive", "quarter", "quarter, naive")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="a checkpoint that tools.quantize wrote (default: a random one of 0.8 GB)"
    )
    parser.add_argument("--folder", type=Path, help="where the random one is kept for the next time")
    parser.add_argument("--slots", type=at_least_one, help="of each layer (default: half of its experts)")
    parser.add_argument("--link-gbps", type=float, help="of each direction of the link")
    parser.add_argument("--disk-gbps", type=float, help="of the disk")
    parser.add_argument("--dtype", choices=DTYPES, help="what to compute in (default: the engine's)")
    parser.add_argument("--threads", type=at_least_one, help="that compute (default: all but one)")
    parser.add_argument("--tokens", type=at_least_one, default=24, help="per turn (default: 24)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="turns of each way (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per turn on stderr. Returns all figures."""
    threads = args.threads or max(pick_threads() - 1, 1)
    with subject(args) as folder, using_threads(threads), ExitStack() as stack:
        stage = Stage(open_checkpoint(folder), args, stack)
        about = {"checkpoint": stage.checkpoint.description, "threads": threads}
        return about | stage.measure(args.repeats)


@contextmanager
def subject(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of the model to measure. A random one is made if need be."""
    if args.model:
        if args.folder:
            raise OptionError("--folder is for a random model; leave it out, or leave out --model")
        yield args.model
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / CONFIG).exists():
            random_native(SHAPE, folder, DEFAULT, STEADINESS * SHAPE.hidden**0.5)
        yield folder


@dataclass
class Way:
    """A model whose experts are held in one way, in the middle of a text."""

    name: str
    plan: Plan
    player: Player
    cache: ExpertCache | None
    turns: list[Turn] = dataclasses.field(default_factory=list)

    def turn(self, ids: list[int]) -> tuple[Turn, list[int]]:
        """Decode one id after the other. Returns the likeliest next ones, too."""
        counted, start = self.count(), time.perf_counter()
        chosen = [self.player.prompt(torch.tensor([[i]])) for i in ids]
        return Turn(time.perf_counter() - start, self.count() - counted), chosen

    def count(self) -> Stats:
        return self.cache.count() if self.cache else Stats()

    @property
    def unneeded_reads(self) -> int:
        """Bytes that were read for guesses which did not come true."""
        reads = self.cache.store.channels.reads if self.cache else None
        return reads.wasted if reads else 0


class Stage:
    """All ways over one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, args: argparse.Namespace, stack: ExitStack) -> None:
        self.checkpoint, self.stack, self.tokens = checkpoint, stack, args.tokens
        self.experts = checkpoint.config.layers * checkpoint.config.experts
        slots = args.slots or checkpoint.config.experts // 2
        context = PROMPT + args.tokens * (1 + args.repeats)
        if context > checkpoint.config.context:
            raise OptionError(
                f"{args.repeats} turns of {args.tokens} tokens do not fit the model's context of "
                f"{checkpoint.config.context}; take fewer"
            )
        ids = random_ids(checkpoint.config, context)
        self.prompt, text = ids[:, :PROMPT], ids[0, PROMPT:]
        self.first, *self.texts = [part.tolist() for part in text.split(args.tokens)]
        self.given: dict[str, Any] = {
            "device": "cpu", "dtype": args.dtype, "context": context, "link_gbps": args.link_gbps,
        }  # fmt: skip
        resident = self.open("resident", offload="never")
        self.given |= {"offload": "always", "slots": slots}
        full = self.open("full")
        assert full.cache is not None
        self.expert_bytes = full.cache.store.size
        self.computing = self.time_computing(resident)
        missed = full.turns.pop().counted.misses * self.expert_bytes
        self.link = args.link_gbps or missed / self.computing / self.tokens / 1e9
        self.disk = args.disk_gbps or self.link / 4
        full.cache.copies.link = HostLink(self.link * 1e9)  # it is idle now
        self.given |= {"link_gbps": self.link, "disk_gbps": self.disk}
        half = max(self.experts - slots * checkpoint.config.layers + SPARE_BERTHS, SPARE_BERTHS)
        berths = {"half": half, "quarter": max(half // 2, SPARE_BERTHS)}
        self.ways = [resident, full, *(self.open(name, berths=berths[name.split(",")[0]]) for name in WAYS)]

    def open(self, name: str, **options: Any) -> Way:
        """Load the model, and let it read the prompt and the first part of the text, so that from then on
        slots and berths hold what they hold in a long text."""
        engine_options = EngineOptions(**self.given | options)
        config = self.checkpoint.config
        plan = plan_checkpoint(self.checkpoint, engine_options)
        form = ExpertFormat.of(config, self.checkpoint.formats.experts, plan.dtype, Target.of(plan.device))
        model, cache, files = load_weights(self.checkpoint, plan, engine_options, form)
        for made in (files, cache):
            if made:
                self.stack.callback(made.close)
        if cache and name.endswith("naive"):
            drop_what_leaves(cache.store)
        kv = KVCache.allocate(config, 1, plan.context, plan.dtype, plan.device, plan.kv)
        way = Way(name, plan, Player(model, kv, plan.chunk, None), cache)
        way.player.prompt(self.prompt)
        way.turns.append(way.turn(self.first)[0])
        say(f"{name}: {plan.berths} berths")
        return way

    def time_computing(self, resident: Way) -> float:
        """Seconds for a token if nothing is copied."""
        turns = []
        for _ in range(3):
            resident.player.kv.truncate(PROMPT)
            turns.append(resident.turn(self.first)[0])
        return median_seconds(turns) / self.tokens

    def measure(self, repeats: int) -> dict[str, Any]:
        """All ways in turn, `repeats` times."""
        unneeded = {way.name: -way.unneeded_reads for way in self.ways}
        for way in self.ways:
            way.turns.clear()
        same = True
        for repeat, text in enumerate(self.texts, start=1):
            chosen = []
            for way in self.ways:
                turn, ids = way.turn(text)
                way.turns.append(turn)
                chosen.append(ids)
            same = same and all(ids == chosen[0] for ids in chosen)
            shown = ", ".join(f"{way.name} {self.tokens / way.turns[-1].seconds:.2f}" for way in self.ways)
            say(f"{repeat} of {repeats}: {shown} tokens/s")
        for way in self.ways:
            unneeded[way.name] += way.unneeded_reads
        resident, full, *_ = self.ways
        self.computing = median_seconds(resident.turns) / self.tokens
        return {
            "slots": list(full.plan.slots_per_layer),
            "experts": self.experts,
            "expert_bytes": self.expert_bytes,
            "link_gb_per_s": self.link,
            "disk_gb_per_s": self.disk,
            "same_ids": same,
            "ways": [self.row(way, full, unneeded[way.name]) for way in self.ways],
        }

    def row(self, way: Way, full: Way, unneeded: int) -> dict[str, Any]:
        """A way's median speed, its bytes per token on each channel, and the bound that these set."""
        tokens = len(way.turns) * self.tokens
        total = sum((turn.counted for turn in way.turns), Stats())
        missed = total.misses * self.expert_bytes / tokens
        needed = max(total.read_bytes - unneeded, 0) / tokens
        bound = max(self.computing, missed / self.link / 1e9, needed / self.disk / 1e9)
        seconds = median_seconds(way.turns) / self.tokens
        pairs = zip(full.turns, way.turns, strict=True)
        return {
            "way": way.name,
            "berths": way.plan.berths,
            "tokens_per_s": 1 / seconds,
            "of_full": statistics.median(theirs.seconds / ours.seconds for theirs, ours in pairs),
            "bound_ms": bound * 1e3,
            "share_of_bound": bound / seconds,
            "hit_ratio": total.hit_ratio,
            "missed_mb": missed / 1e6,
            "copied_mb": total.copied_bytes / tokens / 1e6,
            "written_back_mb": total.written_back_bytes / tokens / 1e6,
            "read_mb": total.read_bytes / tokens / 1e6,
        }


def drop_what_leaves(store: Store) -> None:
    """Have an expert that leaves its slot, and has no berth, stay in its file alone."""

    def evict(label: Label, *rest: object) -> bool:
        _, layer, expert, _ = label
        if not store.berths.sink(store.key(layer, expert)):
            store.dropped(layer, expert)
        return False

    store.evict = evict  # type: ignore[method-assign, assignment]
