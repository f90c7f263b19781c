"""The model that a benchmark measures: a checkpoint, or random weights made in place, planned as an engine
with the same options plans it.

A random model of Mixtral-8x7B's size takes seconds to make, because only a few of its experts are distinct
and the others are copies. Where experts are offloaded, those of a random model share `HOST_BYTES` of host
memory, so that a machine needs no 24 GB to spare. That is more than a processor's caches hold, so copies to
the device still come from memory.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, MappedFiles, open_checkpoint
from model.config import ModelConfig
from model.mixtral import Block, Mixtral
from model.moe import Experts
from model.quant.expert import ExpertFormat
from model.quant.formats import DEFAULT, Formats
from model.quant.spec import QuantSpec
from model.shapes import SHAPES
from model.target import Target
from runtime.errors import DeviceError, OptionError
from runtime.experts.arena import Arena
from runtime.experts.berths import Berths
from runtime.experts.cache import ExpertCache
from runtime.experts.making import cache_over, make_channels
from runtime.experts.policy import make_policy
from runtime.experts.rates import divide_misses
from runtime.experts.store import Store
from runtime.experts.tiers import SPARE_BERTHS
from runtime.hub.opening import find_folder
from runtime.loader import load_model, load_resident
from runtime.options import EngineOptions
from runtime.planning.plan import Plan
from runtime.planning.planner import plan_model
from runtime.planning.request import DEFAULT_CONTEXT
from runtime.shell.arguments import MODEL_HELP, add_flags, at_least_one, from_flags
from runtime.shell.progress import download_bar
from runtime.units import format_bytes, parse_bytes
from tools.bench.link import give_back, measure_link, measure_memory, wait
from tools.bench.random_model import random_blobs, random_model

DISTINCT = 4  # experts of a random model; the others are copies
HOST_BYTES = 2 << 30  # of blobs that stand for all of a random model's offloaded experts
REPEATS = 3  # of the measurements of link and memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model to measure, and all engine options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", nargs="?", help=MODEL_HELP)
    source.add_argument("--shape", choices=SHAPES, help="a model of random weights, made in memory")
    parser.add_argument("--layers", type=at_least_one, help="of the random model (default: the shape's)")
    for kind, spec in DEFAULT.by_kind().items():
        parser.add_argument(
            f"--{kind}", metavar="FORMAT", help=f"of the random model, like 3g128 (default: {spec})"
        )
    parser.add_argument(
        "--enforce", action="store_true", help="have PyTorch refuse device memory beyond --vram"
    )
    add_flags(parser, EngineOptions)


class SharedArena:
    """Host memory for experts, used as an arena, in which several experts of a random model share one blob:
    berth n is blob n mod `count`."""

    def __init__(self, blob_bytes: int, count: int, device: torch.device) -> None:
        """`device` is where blobs are to be copied."""
        self.count, self.blob_bytes = count, blob_bytes
        self.memory = Arena(count, blob_bytes, device.type == "cuda", device)
        self.pinned, self.locked, self.close = self.memory.pinned, self.memory.locked, self.memory.close

    def berth(self, number: int) -> Tensor:  # [blob_bytes] uint8
        return self.memory.berth(number % self.count)[: self.blob_bytes]


@dataclass
class Subject:
    """A model whose experts are resident or, with a `store`, provided by a cache that is made later."""

    model: Mixtral
    plan: Plan
    form: ExpertFormat
    options: EngineOptions
    about: str
    link: float  # bytes per second from the host to the device, measured in the same run
    memory: float  # bytes per second of the device's own memory
    store: SharedArena | None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.model.layers]

    def provide(self, experts: Callable[[int], Experts]) -> None:
        """Have each layer compute with `experts(layer)` from now on."""
        for layer, block in enumerate(self.blocks):
            block.block_sparse_moe.experts = experts(layer)

    def describe(self) -> dict[str, Any]:
        """What a report says of the model, and of the machine's speed in this run."""
        plan, options = self.plan, self.options
        report: dict[str, Any] = {
            "model": self.about,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "device": str(plan.device),
            "threads": torch.get_num_threads(),
            "context": plan.context,
            "link_bytes_per_s": self.link,
            "memory_bytes_per_s": self.memory,
            "resident": self.store is None,
        }
        if self.store is None:
            return report
        size = format_bytes(self.store.count * self.form.blob_bytes)
        return report | {
            "policy": options.policy,
            "lookahead": options.lookahead if options.prefetch else 0,
            "prefetch": options.prefetch,
            "misses": options.misses,
            "expert_bytes": plan.blob_bytes,
            "host_memory": f"{'pinned' if self.store.pinned else 'pageable'}, {self.store.count} blobs "
            f"({size}) for {self.config.layers * self.config.experts} experts",
        }

    def close(self) -> None:
        """Free the device's memory; the cache, if there was one, has freed the host's."""
        self.__dict__.pop("model", None)
        give_back(self.plan.device)


def make_subject(args: argparse.Namespace, tokens: int, **defaults: Any) -> Subject:
    """The model that the command line describes, with a context of at least `tokens`. `defaults` replace
    those of engine options that the command line leaves out.

    Raises as `runtime.planning.planner.plan_model` does, before anything is loaded or made.
    """
    checkpoint, config, formats, about = find_model(args)
    if tokens > config.context:
        raise OptionError(f"these are {tokens} tokens, and this model was made for {config.context}")
    defaults.setdefault("context", max(tokens, min(DEFAULT_CONTEXT, config.context)))
    options = from_flags(EngineOptions, argparse.Namespace(**defaults | vars(args)))
    if options.distributed:
        raise OptionError("a benchmark measures one process; leave out --distributed (see dev.bench ranks)")
    if (options.context or 0) < tokens:
        raise OptionError(f"{tokens} tokens do not fit --context {options.context}")
    plan = plan_model(config, formats, options, checkpoint.mappable if checkpoint else None)
    if plan.tiered:
        raise DeviceError(
            f"a benchmark holds all {plan.experts} experts in host memory, and {plan.berths} have berths; "
            "leave out --berths, raise --ram, or take a model of fewer bits"
        )
    if plan.device.type == "cpu" and plan.misses != "copy":
        raise OptionError("on a CPU, only dev.bench misses measures --misses; leave it out")
    form = ExpertFormat.of(config, formats.experts, plan.dtype, Target.of(plan.device))
    link, memory = measure_rates(plan.device, options)
    if args.enforce:
        enforce(plan, options)
    model, store = make_model(checkpoint, config, formats, plan, form)
    give_back(plan.device)  # what making it took
    return Subject(model, plan, form, options, about, link, memory, store)


def find_model(
    args: argparse.Namespace,
) -> tuple[Checkpoint | None, ModelConfig, Formats, str]:
    """A checkpoint, or None for random weights; configuration, formats, and what to call it all in a
    report."""
    given = {kind: getattr(args, kind) for kind in DEFAULT.by_kind() if getattr(args, kind) is not None}
    if args.shape:
        config = SHAPES[args.shape]
        config = replace(config, layers=args.layers or config.layers)
        formats = replace(DEFAULT, **{kind: QuantSpec.parse(text) for kind, text in given.items()})
        layers = f"{config.layers} layer{'s' * (config.layers > 1)}"
        about = f"{args.shape}, {layers}, random, {formats}"
        return None, config, formats, about
    for name in [*given, *["layers"] * (args.layers is not None)]:
        raise OptionError(f"--{name} is for a random model; a checkpoint has its own")
    checkpoint = open_checkpoint(find_folder(args.model, download_bar))
    return checkpoint, checkpoint.config, checkpoint.formats, checkpoint.description


def measure_rates(device: torch.device, options: EngineOptions) -> tuple[float, float]:
    """Bytes per second of the link and of the device's memory. This needs memory of its own, so it comes
    before there is a model."""
    link, memory = measure_link(device, REPEATS), measure_memory(device, REPEATS)
    give_back(device)
    return min(link, options.link_gbps * 1e9) if options.link_gbps else link, memory


def enforce(plan: Plan, options: EngineOptions) -> None:
    """Give PyTorch --vram less what is taken outside of it: the driver's context, and perhaps other programs,
    which count for no more than the plan leaves to the driver."""
    if options.vram is None or plan.device.type != "cuda":
        raise OptionError("--enforce wants a GPU and --vram")
    free, total = torch.cuda.mem_get_info(plan.device)
    outside = total - free - torch.cuda.memory_reserved(plan.device)
    share = (parse_bytes(options.vram, whole=free) - min(outside, plan.driver_bytes)) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), plan.device)


def make_model(
    checkpoint: Checkpoint | None,
    config: ModelConfig,
    formats: Formats,
    plan: Plan,
    form: ExpertFormat,
) -> tuple[Mixtral, SharedArena | None]:
    """The model, and the store of its experts if they are offloaded."""
    dtype, device = plan.dtype, plan.device
    store = None if plan.resident else make_store(config, form, device, shared=checkpoint is None)
    if checkpoint is None:
        provide = no_experts if store else None
        return random_model(config, formats, dtype, device, DISTINCT, provide), store
    files = MappedFiles(checkpoint.layout) if plan.mapped_bytes else None
    if store is None:
        return load_resident(checkpoint, form, dtype, device, files=files), None
    keys = product(range(config.layers), range(config.experts))
    blobs = {key: store.berth(n) for n, key in enumerate(keys)}
    return load_model(checkpoint, form, dtype, device, no_experts, blobs, files=files), store


def make_store(config: ModelConfig, form: ExpertFormat, device: torch.device, shared: bool) -> SharedArena:
    """A store for all experts of a checkpoint, to be read later, or for a few random ones that are shared."""
    every = config.layers * config.experts
    if not shared:
        return SharedArena(form.blob_bytes, every, device)
    few = max(HOST_BYTES // form.blob_bytes // DISTINCT * DISTINCT, config.experts)
    count = min(every, -(-few // DISTINCT) * DISTINCT)  # blob n is expert n mod DISTINCT
    store = SharedArena(form.blob_bytes, count, device)
    random_blobs(form, [store.berth(n) for n in range(count)], DISTINCT)
    return store


def no_experts(layer: int) -> Experts:
    """What a layer has until there is a cache."""
    return cast(Experts, None)


def make_cache(subject: Subject) -> ExpertCache:
    """A cache as it is planned, over the subject's store, which it closes. It is not installed."""
    store, options, plan = subject.store, subject.options, subject.plan
    assert store is not None
    config, arena = subject.config, cast(Arena, store)
    channels = make_channels(plan.device, arena, link_gbps=options.link_gbps)
    every = config.layers * config.experts
    berths = Berths(every, make_policy(options.policy, 0, config.layers), SPARE_BERTHS, every)
    kept = Store(arena, berths, config.experts, subject.form.kept[-1].end, channels)
    kept.load(config.layers)
    cache = cache_over(
        kept, subject.form, plan.device, plan.slots_per_layer, plan.spares, options.policy, options.prefetch
    )
    for n, blob in enumerate(cache.pool):  # uninitialized memory may hold no numbers, or not be there yet
        blob.copy_(cache.pool[n % DISTINCT] if n >= DISTINCT else store.berth(n))
    wait(plan.device)  # later copies to the slots come from another stream
    if options.misses != "copy":
        subject.plan = divide_misses(cache, plan, options)
    return cache
