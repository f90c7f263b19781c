"""From a model's name to a model that serves requests: plan, tokenizer, weights, warm-up.

Nothing is allocated before the plan is made, and no weight is read before everything that can be checked
without it has been.
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from os import PathLike

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, Identity, MappedFiles, identify, open_checkpoint
from model.config import ModelConfig
from model.errors import ModelError
from model.mixtral import Mixtral
from model.quant.expert import ExpertFormat
from model.target import Target
from runtime.errors import DeviceError, LoadError
from runtime.experts.cache import ExpertCache
from runtime.experts.files import ExpertFiles
from runtime.experts.making import make_cache
from runtime.experts.rates import divide_misses
from runtime.gpu.warm_up import Bar, prepare
from runtime.hub.names import title
from runtime.hub.opening import find_folder, open_headers
from runtime.loader import kernels_to_compile, load_model, load_resident
from runtime.options import EngineOptions
from runtime.planning.plan import Plan
from runtime.planning.planner import check_fits, plan_checkpoint
from runtime.process.ambient import default_settings
from runtime.process.interrupts import restore_interrupts
from runtime.process.shortage import shortage_as
from runtime.process.threads import start_threads, using_threads
from runtime.runner import ModelRunner
from tokenizer import Tokenizer, TokenizerError

MOST_PADDING = 256  # ids that a model has beyond its tokenizer's, to round their number up
REMEDY = "lower --context, give the model fewer bits (python -m tools.quantize), or free some"

Judge = Callable[[Tokenizer, Plan, ModelConfig], None]


def plan_named(name: str | PathLike[str], options: EngineOptions) -> Plan:
    """Plan a model without loading it. See `Engine.plan`."""
    with restore_interrupts(), shortage_as(DeviceError, REMEDY):
        try:
            return plan_checkpoint(open_headers(name), options)
        except ModelError as error:
            raise LoadError(str(error)) from error


def start(
    name: str | PathLike[str],
    options: EngineOptions,
    progress: Bar | None,
    compiling: Bar | None,
    judge: Judge | None,
    downloading: Bar | None,
) -> tuple[ModelRunner, Tokenizer]:
    """Load the model of this name. The arguments and errors are those of `Engine.load`."""
    with restore_interrupts(), shortage_as(DeviceError, REMEDY), using_threads(options.threads):
        start_threads()
        try:
            checkpoint = open_checkpoint(find_folder(name, downloading, partial(check_fits, options=options)))
            plan = plan_checkpoint(checkpoint, options)
            tokenizer = load_tokenizer(checkpoint, options)
            if judge:
                judge(tokenizer, plan, checkpoint.config)
            identity = identify(checkpoint, title(name))
            runner = make_runner(checkpoint, identity, plan, tokenizer, options, progress, compiling)
        except (ModelError, TokenizerError) as error:
            raise LoadError(str(error)) from error
    return runner, tokenizer


def load_tokenizer(checkpoint: Checkpoint, options: EngineOptions) -> Tokenizer:
    """The checkpoint's tokenizer. Raises `LoadError` if it has more ids than the model, and warns if it lacks
    many."""
    vocab = checkpoint.config.vocab
    tokenizer = Tokenizer.load(checkpoint.folder, options.chat_template, vocab)
    if tokenizer.vocab_size > vocab:
        raise LoadError(
            f"{checkpoint.folder}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{vocab}; they do not belong together"
        )
    if (missing := vocab - tokenizer.vocab_size) > MOST_PADDING:
        warnings.warn(
            f"{checkpoint.folder}: the tokenizer lacks {missing} of the model's {vocab} ids; "
            "look whether the model has a newer tokenizer.model",
            RuntimeWarning,
            stacklevel=4,  # the caller of Engine.load
        )
    return tokenizer


def make_runner(
    checkpoint: Checkpoint,
    identity: Identity,
    plan: Plan,
    tokenizer: Tokenizer,
    options: EngineOptions,
    progress: Bar | None,
    compiling: Bar | None,
) -> ModelRunner:
    """Read the weights, and warm up. An error leaves nothing open."""
    config, device = checkpoint.config, plan.device
    bar = progress(checkpoint.bytes) if progress else nullcontext(None)
    # The caller may be in inference mode, and no other thread could fill the tensors made there.
    with default_settings(device), torch.inference_mode(False):
        form = ExpertFormat.of(config, checkpoint.formats.experts, plan.dtype, Target.of(device))
        with bar as advance:
            model, cache, files = load_weights(checkpoint, plan, options, form, advance)
        runner = None
        try:
            ends = frozenset(config.eos_ids) | {i for i in tokenizer.ends if i < config.vocab}
            unused = unused_ids(config.vocab, tokenizer.vocab_size, ends, device)
            compile_kernels(model, form, plan.kv, compiling)
            if cache and options.misses != "copy":
                plan = divide_misses(cache, plan, options)
            runner = ModelRunner(model, identity, cache, plan, options, ends, unused, files)
            prepare(runner, compiling)
        except BaseException:  # the caller may keep it, and with it the frames that refer to the weights
            for made in (runner or cache, files):
                if made:
                    made.close()
            raise
    return runner


def load_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    options: EngineOptions,
    form: ExpertFormat,
    progress: Callable[[int], None] | None = None,
) -> tuple[Mixtral, ExpertCache | None, MappedFiles | None]:
    """The model, the cache of its experts unless all of them are resident, and the files if it is mapped."""
    dtype, device = plan.dtype, plan.device
    files = MappedFiles(checkpoint.layout) if plan.mapped_bytes else None
    if plan.resident:
        return load_resident(checkpoint, form, dtype, device, progress, files), None, files
    config = checkpoint.config
    tiers = ExpertFiles.of(checkpoint, form, plan.direct_reads) if plan.tiered else None
    cache = make_cache(
        form, device, config.experts, plan.slots_per_layer, plan.spares, plan.berths,
        options.policy, options.prefetch, options.link_gbps, options.disk_gbps, tiers,
    )  # fmt: skip
    try:
        berths = cache.store.load(config.layers)
        if progress:  # the others are read when they are needed
            progress((config.layers * config.experts - len(berths)) * form.stored[-1].end)
        model = load_model(checkpoint, form, dtype, device, cache.layer, berths, progress, files)
        if tiers:
            tiers.check()
        if options.lookahead and options.prefetch:
            model.look_ahead(options.lookahead)
    except BaseException:
        cache.close()
        raise
    return model, cache, files


def compile_kernels(model: Mixtral, form: ExpertFormat, kv_bits: int, progress: Bar | None) -> None:
    """Compile a CPU's kernels, which takes seconds the first time that a format is used on a machine."""
    works = kernels_to_compile(model, form, kv_bits)
    with progress(len(works)) if progress and works else nullcontext(None) as advance:
        for work in works:
            work()
            if advance:
                advance(1)


def unused_ids(model: int, tokenizer: int, used: Iterable[int], device: torch.device) -> Tensor | None:
    """Mark the ids that no token has, [V] bool, or return None if there are none. A padded vocabulary
    has such ids, which the tokenizer lacks. The configuration names those in `used`, so they have a meaning.

    >>> unused_ids(6, 3, {2, 4}, torch.device("cpu")).tolist()
    [False, False, False, True, False, True]
    """
    if model == tokenizer:
        return None
    unused = torch.arange(model, device=device) >= tokenizer
    unused[[i for i in used if i < model]] = False
    return unused
