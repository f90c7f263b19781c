"""What the benchmarks measure: a checkpoint, or a model of random weights made in place, on a device, planned
as an engine with the same options plans it.

A random model of Mixtral-8x7B's size takes seconds to make: a few of its experts are distinct, and the others
copies of these. Where experts are offloaded, those in host memory share `HOST_BYTES` of it, so that a machine
without 24 GB to spare will do. That is more than a processor's caches hold, so copies to the device
come from memory all the same.
"""

import argparse
import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, open_checkpoint
from model.config import ModelConfig
from model.mixtral import Block, Mixtral
from model.moe import Experts
from model.quant.expert import ExpertFormat
from model.quant.spec import QuantSpec
from model.shapes import SHAPES
from runtime.errors import OptionError
from runtime.experts.arena import Arena
from runtime.experts.cache import ExpertCache
from runtime.loader import load_model, load_resident
from runtime.options import EngineOptions
from runtime.planning.planner import Plan
from runtime.planning.setup import DEFAULT_CONTEXT, Setup, plan_model
from runtime.shell.arguments import add_flags, at_least_one, from_flags
from runtime.units import format_bytes, parse_bytes
from tools.bench.link import give_back as empty_cache
from tools.bench.link import measure_link, measure_memory, wait
from tools.bench.random_model import random_blobs, random_model

DISTINCT = 4  # experts of a random model; the others are copies
HOST_BYTES = 2 << 30  # of blobs that stand for all of a random model's offloaded experts
REPEATS = 3  # of the measurements of link and memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how an engine shall hold it."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", type=Path, nargs="?", help="a checkpoint folder")
    source.add_argument("--shape", choices=SHAPES, help="a model of random weights, made in memory")
    parser.add_argument("--layers", type=at_least_one, help="of the random model (default: the shape's)")
    parser.add_argument(
        "--attention", metavar="FORMAT", help="of the random model, like 4 or 3g128 (default: 4)"
    )
    parser.add_argument("--experts", metavar="FORMAT", help="of the random model (default: 4)")
    parser.add_argument(
        "--enforce",
        action="store_true",
        help="let PyTorch refuse device memory beyond --vram, in this process",
    )
    add_flags(parser, EngineOptions)


class Store:
    """Host memory for experts, as an arena: of a random model's many share one blob.

    Expert e of layer l is blob n mod `count` of them, n = l E + e. It outlives the caches that it is lent to.
    """

    def __init__(
        self, layers: int, experts: int, blob_bytes: int, count: int | None, device: torch.device
    ) -> None:
        """`device` is where blobs are to be copied."""
        self.experts, self.count = experts, count or layers * experts
        self.memory = Arena(1, self.count, blob_bytes, device.type == "cuda", device)
        self.pinned = self.memory.pinned

    def blob(self, layer: int, expert: int) -> Tensor:  # [blob_bytes] uint8
        return self.memory.blob(0, (layer * self.experts + expert) % self.count)

    def close(self) -> None:
        """A cache is done with it."""

    def free(self) -> None:
        self.memory.close()


@dataclass(frozen=True)
class Rates:
    """Bytes per second, measured in the same run."""

    link: float  # from the host to the device
    memory: float  # of the device


@dataclass
class Subject:
    """A model, whose experts are resident, or, with a `store`, yet to be provided by a cache."""

    model: Mixtral
    formats: tuple[QuantSpec, QuantSpec]  # of attention and experts
    setup: Setup
    options: EngineOptions
    about: str
    rates: Rates
    store: Store | None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.model.layers]

    def provide(self, experts: Callable[[int], Experts]) -> None:
        """`experts(layer)` compute from now on."""
        for layer, block in enumerate(self.blocks):
            block.block_sparse_moe.experts = experts(layer)

    def plan(self, slots: int) -> Plan:
        """For another number of slots. Raises as `plan_model` does."""
        options = dataclasses.replace(self.options, slots=slots, offload="always")
        return plan_model(self.config, *self.formats, options).plan

    def describe(self) -> dict[str, Any]:
        """For the report."""
        plan, options = self.setup.plan, self.options
        report: dict[str, Any] = {
            "model": self.about,
            "dtype": str(self.setup.dtype).removeprefix("torch."),
            "device": str(self.setup.device),
            "threads": torch.get_num_threads(),
            "context": plan.context,
            "graphs": options.graphs and self.setup.form.pair is not None,
            "link_bytes_per_s": self.rates.link,
            "memory_bytes_per_s": self.rates.memory,
        }
        if self.store is None:
            return report | {"resident": True}
        size = self.store.count * self.setup.form.blob_bytes
        return report | {
            "resident": False,
            "policy": options.policy,
            "lookahead": options.lookahead if options.prefetch else 0,
            "prefetch": options.prefetch,
            "expert_bytes": plan.blob_bytes,
            "computing_alone": "from the slots, whichever experts they hold",
            "host_memory": f"{'pinned' if self.store.pinned else 'pageable'}, {self.store.count} blobs "
            f"({format_bytes(size)}) for {self.config.layers * self.config.experts} experts",
        }

    def close(self) -> None:
        """Let go of the device's memory and the host's."""
        if self.store is not None:
            self.store.free()
        self.__dict__.pop("model", None)
        give_back(self.setup.device)


def make_subject(args: argparse.Namespace, tokens: int, **defaults: Any) -> Subject:
    """What the command line describes, with a context of at least so many `tokens`. `defaults` are of engine
    options that it leaves out.

    Raises as `runtime.planning.setup.plan_model` does, before anything is loaded or made.
    """
    checkpoint: Checkpoint | None = None
    if args.shape:
        config = SHAPES[args.shape]
        config = dataclasses.replace(config, layers=args.layers or config.layers)
        formats = QuantSpec.parse(args.attention or "4"), QuantSpec.parse(args.experts or "4")
        layers = f"{config.layers} layer{'s' * (config.layers > 1)}"
        about = f"{args.shape}, {layers}, random, attention {formats[0]}, experts {formats[1]}"
    else:
        for name in ("layers", "attention", "experts"):
            if getattr(args, name) is not None:
                raise OptionError(f"--{name} is for a random model; a checkpoint has its own")
        checkpoint = open_checkpoint(args.model)
        config, formats = checkpoint.config, (checkpoint.attention, checkpoint.experts)
        about = checkpoint.description
    if tokens > config.context:
        raise OptionError(f"these are {tokens} tokens, and this model was made for {config.context}")
    defaults.setdefault("context", max(tokens, min(DEFAULT_CONTEXT, config.context)))
    options = from_flags(EngineOptions, argparse.Namespace(**defaults | vars(args)))
    if (options.context or 0) < tokens:
        raise OptionError(f"{tokens} tokens do not fit --context {options.context}")
    setup = plan_model(config, *formats, options)
    rates = measure_rates(setup.device, options)
    if args.enforce:
        enforce(setup, options)
    model, store = make_model(checkpoint, config, formats, setup)
    give_back(setup.device)  # what making it took
    return Subject(model, formats, setup, options, about, rates, store)


def measure_rates(device: torch.device, options: EngineOptions) -> Rates:
    """Before there is a model, whose memory these would take."""
    link, cap = measure_link(device, REPEATS), options.link_gbps
    rates = Rates(min(link, cap * 1e9) if cap else link, measure_memory(device, REPEATS))
    give_back(device)
    return rates


def enforce(setup: Setup, options: EngineOptions) -> None:
    """PyTorch gets the limit less what is taken outside of it by now: the driver's context, and perhaps other
    programs, which are not to count for more than the plan leaves to the driver."""
    if options.vram is None or setup.device.type != "cuda":
        raise OptionError("--enforce wants a GPU and --vram")
    free, total = torch.cuda.mem_get_info(setup.device)
    outside = total - free - torch.cuda.memory_reserved(setup.device)
    share = (parse_bytes(options.vram, whole=free) - min(outside, setup.plan.driver_bytes)) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), setup.device)


def make_model(
    checkpoint: Checkpoint | None, config: ModelConfig, formats: tuple[QuantSpec, QuantSpec], setup: Setup
) -> tuple[Mixtral, Store | None]:
    """The model, and where its experts are if they are not all resident."""
    form, dtype, device = setup.form, setup.dtype, setup.device
    if setup.plan.resident and checkpoint:
        return load_resident(checkpoint, form, dtype, device), None
    if setup.plan.resident:
        return random_model(config, *formats, dtype, device, distinct=DISTINCT), None
    store = make_store(config, form, device, shared=checkpoint is None)
    if checkpoint:
        return load_model(checkpoint, form, dtype, device, nobody, store.blob), store
    return random_model(config, *formats, dtype, device, distinct=DISTINCT, provide=nobody), store


def make_store(config: ModelConfig, form: ExpertFormat, device: torch.device, shared: bool) -> Store:
    """For all experts of a checkpoint, which are yet to be read, or a few of a random model."""
    every, count = config.layers * config.experts, None
    if shared:
        few = HOST_BYTES // form.blob_bytes // DISTINCT * DISTINCT
        count = min(every, max(few, config.experts, DISTINCT))
        count = (
            count if count == every else -(-count // DISTINCT) * DISTINCT
        )  # blob n is expert n mod DISTINCT
    store = Store(config.layers, config.experts, form.blob_bytes, count, device)
    if shared:
        random_blobs(form, [store.memory.blob(0, n) for n in range(store.count)], distinct=DISTINCT)
    return store


def nobody(layer: int) -> Experts:
    """Until there is a cache."""
    return cast(Experts, None)


def make_cache(subject: Subject, plan: Plan) -> ExpertCache:
    """A cache with these slots over the subject's store, with a link of its own. It is not installed."""
    store, options, device = subject.store, subject.options, subject.setup.device
    assert store is not None
    arena, form = cast(Arena, store), subject.setup.form
    policy, prefetch, rate = options.policy, options.prefetch, options.link_gbps
    cache = ExpertCache.over(arena, plan, form, device, policy, prefetch, rate)
    fill(cache.pool, store)
    wait(device)  # what is copied to slots later on comes from another stream
    return cache


def fill(pool: Tensor, store: Store) -> None:
    """Some expert in every slot: what nobody wrote may be no numbers, or take no memory."""
    for n, blob in enumerate(pool):
        blob.copy_(pool[n % DISTINCT] if n >= DISTINCT else store.memory.blob(0, n % store.count))


def look_ahead(subject: Subject, wanted: bool) -> None:
    """Have the subject's routers look ahead as an engine's do, or not at all."""
    options = subject.options
    subject.model.look_ahead(options.lookahead if wanted and options.prefetch else 0)


def give_back(device: torch.device) -> None:
    """What nobody refers to any more, to whoever plans or measures what the device has."""
    if device.type == "cuda":
        gc.collect()
        empty_cache(device)
        torch.cuda.reset_peak_memory_stats(device)
