"""Load one rank's part of a model, together with all other ranks.

The ranks meet, and tell each other what must be equal and what they have. Each works out the same shares,
plans its own part, and says what it came to. Nothing is allocated before all plans are made, and no request
begins before all parts are loaded.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path

from model.checkpoint import Checkpoint, Identity, identify, open_checkpoint
from model.config import ModelConfig
from model.errors import ModelError
from model.part import Part
from runtime.errors import DeviceError, LoadError, OptionError
from runtime.gpu.warm_up import Bar
from runtime.hub.names import title
from runtime.hub.opening import find_folder, open_headers
from runtime.options import EngineOptions
from runtime.planning.offer import Offer
from runtime.planning.plan import Plan
from runtime.planning.planner import plan_part
from runtime.planning.rank_plans import RankPlans
from runtime.planning.sharing import share_layers
from runtime.process.interrupts import restore_interrupts
from runtime.process.shortage import shortage_as
from runtime.process.threads import start_threads, using_threads
from runtime.ranks.agreement import differences, facts
from runtime.ranks.follower import Follower
from runtime.ranks.frames import frame_bytes
from runtime.ranks.meeting import Meeting
from runtime.ranks.membership import Membership
from runtime.ranks.orders import Order
from runtime.ranks.pipeline import Pipeline
from runtime.ranks.ring import Ring
from runtime.runner import ModelRunner
from runtime.startup import REMEDY, Judge, load_tokenizer, make_runner, start
from tokenizer import Tokenizer, TokenizerError


def start_rank(
    name: str | PathLike[str],
    options: EngineOptions,
    progress: Bar | None,
    compiling: Bar | None,
    judge: Judge | None,
    downloading: Bar | None,
    meeting: Meeting | None = None,
) -> tuple[ModelRunner, Tokenizer]:
    """Load this rank's part of the model of this name. The arguments and errors are those of `Engine.load`.
    `meeting` is where the ranks meet; by default it is found as torchrun tells. Only rank 0 asks `judge`."""
    with joined(options, meeting) as together:
        if together.size == 1:
            together.close()
            alone = partial(judge_alone, options, judge)
            return start(name, options, progress, compiling, alone, downloading)
        start_threads()
        return load_rank(together, name, options, progress, compiling, judge, downloading)


def judge_alone(
    options: EngineOptions, judge: Judge | None, tokenizer: Tokenizer, plan: Plan, config: ModelConfig
) -> None:
    """`judge`, of the only rank. Raises `OptionError` if it is asked for some of the layers."""
    if options.rank_layers not in (None, f"{config.layers}"):
        raise OptionError(
            f"rank_layers is {options.rank_layers}, and the only rank has all {config.layers} layers; "
            "start more ranks, or leave it out"
        )
    if judge:
        judge(tokenizer, plan, config)


class Disagreement(LoadError):
    """Ranks differ in what must be equal."""


@contextmanager
def joined(options: EngineOptions, meeting: Meeting | None) -> Iterator[Meeting]:
    """Inside, the ranks load together. The error that ends one is told to the others."""
    meeting = meeting or Meeting.join(options.rank_timeout)
    try:
        with restore_interrupts(), shortage_as(DeviceError, REMEDY), using_threads(options.threads):
            try:
                yield meeting
            except (ModelError, TokenizerError) as error:
                raise LoadError(str(error)) from error
    except BaseException as error:
        if not isinstance(error, Disagreement):  # which each rank has found itself
            meeting.fail(error)
        meeting.close()
        raise


def load_rank(
    meeting: Meeting,
    name: str | PathLike[str],
    options: EngineOptions,
    progress: Bar | None,
    compiling: Bar | None,
    judge: Judge | None,
    downloading: Bar | None,
) -> tuple[ModelRunner, Tokenizer]:
    rank = meeting.rank
    checkpoint = open_checkpoint(find_in_turn(meeting, partial(find_folder, name, downloading)))
    identity = identify(checkpoint, title(name))
    agree(meeting, options, identity)
    tokenizer = load_tokenizer(checkpoint, options)
    plans, own = plan_ranks(meeting, checkpoint, options)
    plan = plans.plans[rank]
    if judge and rank == 0:
        judge(tokenizer, plan, checkpoint.config)
    runner = make_runner(own, identity, plan, tokenizer, options, progress, compiling)
    try:
        length = Order.length(plan.parallel)
        frame = frame_bytes(plan.parallel, checkpoint.config.hidden, plan.dtype, length)
        ring = Ring(meeting, frame, device=runner.device)
        try:
            meeting.share("ready", True)
        except BaseException:
            ring.close()
            raise
        role: Pipeline | Follower
        if rank == 0:
            role = runner.passes = Pipeline(runner.model, runner.decoder, ring, meeting.size, plan.parallel)
        else:
            role = Follower(runner, ring, rank, plan.parallel)
        runner.company = Membership(meeting, ring, plans, role)
    except BaseException:
        runner.close()
        raise
    return runner, tokenizer


def plan_named_ranks(
    name: str | PathLike[str], options: EngineOptions, meeting: Meeting | None = None
) -> tuple[int, RankPlans]:
    """This process's rank, and all ranks' plans of a model, without loading it. Raises as `start_rank`
    does."""
    with joined(options, meeting) as together:
        checkpoint = open_headers(name)
        planned = f"{checkpoint.config} {checkpoint.formats}"  # of a model at the hub, there may be no more
        agree(together, options, Identity(title(name), hashlib.sha256(planned.encode()).hexdigest()))
        plans, _ = plan_ranks(together, checkpoint, options)
        together.close()
        return together.rank, plans


def plan_ranks(
    meeting: Meeting, checkpoint: Checkpoint, options: EngineOptions
) -> tuple[RankPlans, Checkpoint]:
    """All ranks' plans, and this rank's part of the checkpoint."""
    c, here = checkpoint, Offer.here(options, meeting.local_rank, meeting.host)
    offers = [Offer.from_dict(offer) for offer in meeting.share("offers", here.as_dict())]
    counts = share_layers(c.config, c.formats, options, offers, c.mappable)
    agreed = meeting.share("layers", counts)[0]  # machines with other kernels may come to others
    parts = Part.split(c.config, [int(layers) for layers in agreed])
    own = checkpoint.part(parts[meeting.rank])
    plan = plan_part(own, checkpoint, options, offers, meeting.rank)
    plans = [Plan.from_dict(plan) for plan in meeting.share("plans", plan.as_dict())]
    return RankPlans(parts, plans, meeting.hosts, c.config.hidden), own


def agree(meeting: Meeting, options: EngineOptions, identity: Identity) -> None:
    """Raises `Disagreement`, on all ranks, if they differ in what must be equal."""
    if line := differences(meeting.share("facts", facts(options, identity))):
        raise Disagreement(line)


def find_in_turn(meeting: Meeting, find: Callable[[], Path]) -> Path:
    """Find the model's folder. The first rank of each machine may have to download it. The others wait."""
    if meeting.hosts.index(meeting.host) != meeting.rank:
        meeting.share("found", True)
        return find()
    folder = find()
    meeting.share("found", True)
    return folder
