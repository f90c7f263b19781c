"""A model, its tokenizer and its sessions: what a program embeds.

from runtime import Engine, SamplingParams

with Engine.load("path/to/checkpoint") as engine:
    for token in engine.generate("Once upon a time", SamplingParams(max_new_tokens=64)):
        print(token.text, end="", flush=True)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike, fsdecode
from pathlib import Path

from torch import Tensor

from model.mixtral import Mixtral
from runtime.answer import Token
from runtime.batching.batch import Batch, Work
from runtime.errors import OptionError, RequestError
from runtime.experts.policy import policy_name
from runtime.experts.tiers import SPARE_BERTHS, SPARE_SLOTS
from runtime.experts.trace import Header, TraceWriter
from runtime.gpu.warm_up import Bar
from runtime.options import RATES, EngineOptions, SamplingParams
from runtime.planning.attribute import planned
from runtime.planning.plan import Plan
from runtime.planning.rank_plans import RankPlans
from runtime.requests import check_ids, more_context
from runtime.runner import ModelRunner
from runtime.saved import load_session
from runtime.session import DEFAULT_PARAMS, Session
from runtime.startup import Judge, plan_named, start
from runtime.stats import Stats
from tokenizer import Tokenizer, TokenizerError

DEMO = Path(__file__).parent / "demo"
NOTHING_TO_TRACE = (
    "all experts of this process are resident, so there is nothing to trace; use --offload always"
)


class Engine:
    """A loaded model. All its state is in this object, and a process may hold several.

    Sessions may be used from several threads at once, and their forwards take turns. A finalizer or a signal
    handler that runs in the middle of a forward may call `close`, `stats` and `Session.close`, and may leave
    `recording`: these wait for no turn.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.plan, self.config, self.options = runner.plan, runner.config, runner.options
        self.device, self.dtype = runner.device, runner.dtype

    @staticmethod
    def load(
        path: str | PathLike[str] | None = None,
        options: EngineOptions | None = None,
        progress: Bar | None = None,
        compiling: Bar | None = None,
        judge: Judge | None = None,
        downloading: Bar | None = None,
    ) -> "Engine":
        """Load the checkpoint in folder `path`, or the demo model that comes with the package if it is None.

        If there is no such folder, a path like `org/name` or `org/name@revision` is a model at the Hugging
        Face hub. It comes from the Hugging Face cache, and what the cache lacks is downloaded.

        `progress(total)` is entered while weights are read. It gives a function that the engine calls with
        each number of bytes read (see `runtime.shell.progress.byte_bar`). `downloading` does the same while
        files are downloaded, and `compiling` while kernels are compiled, which counts stages. The engine
        calls `judge` with the tokenizer, the plan and the configuration before it reads any weight. An error
        that `judge` raises ends the load.

        Raises `LoadError` if the checkpoint cannot be used, `DeviceError` if this machine cannot run it
        (before anything is read), and `OptionError` if an option does not fit the model.
        """
        name, options = DEMO if path is None else path, options or EngineOptions()
        if not options.distributed:
            return Engine(*start(name, options, progress, compiling, judge, downloading))
        from runtime.ranks.starting import start_rank  # here, since few need what it imports

        return Engine(*start_rank(name, options, progress, compiling, judge, downloading))

    @planned
    @staticmethod
    def plan(path: str | PathLike[str] | None = None, options: EngineOptions | None = None) -> Plan:
        """Plan an engine without loading it: which device and dtype it would use, and how much memory.

            plan = Engine.plan("path/to/checkpoint", EngineOptions(vram="11GiB"))
            print(plan.where, plan.device_bytes, plan.host_bytes, plan.resident)

        Of a folder, a model at the hub or the demo, this reads headers only, and it allocates nothing. Where
        experts do not all fit, it may copy or read for a moment to learn the rates that the options leave
        open. The `plan` of a loaded engine is the `Plan` that it keeps to.

        With `distributed`, all ranks have to call it, and it is the plan of this one.

        Raises as `load` does, except that errors in the tokenizer and in the weights are not found.
        """
        name, options = DEMO if path is None else path, options or EngineOptions()
        if not options.distributed:
            return plan_named(name, options)
        from runtime.ranks.starting import plan_named_ranks

        rank, plans = plan_named_ranks(name, options)
        return plans.plans[rank]

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams = DEFAULT_PARAMS
    ) -> Iterator[Token]:
        """Continue a text, or token ids, in a session of its own.

        A text gets the begin-of-sequence id in front, and ids are taken unchanged. Raises `RequestError` at
        once if the request cannot be served.
        """
        session = self.session()
        try:
            return closing(session, session.start(prompt, params))
        except RequestError:
            session.close()
            raise

    def session(self, system: str | None = None) -> Session:
        """Begin a conversation, with a system message if given."""
        self.check_leads()
        return Session(self.runner, self.tokenizer, system)

    def restore(self, path: str | PathLike[str]) -> Session:
        """Go on with a conversation that `Session.save` wrote to a file.

        The next turn has the same bits as if nothing had come between, on the same machine with the same
        options. Raises `RequestError` if the file is not a saved session, is damaged, is of another model,
        dtype or `kv`, or has more tokens than the context holds.
        """
        session = self.session()
        try:
            with self.runner.working():
                loaded = load_session(Path(fsdecode(path)), self.runner, session.kv)
        except BaseException:
            session.close()
            raise
        session.messages, session.ids = loaded
        return session

    def work(
        self, prompt: str | Sequence[int], params: SamplingParams = DEFAULT_PARAMS, reuse: bool = True
    ) -> Work:
        """What a batch or a service is asked for: to continue a text, or token ids, as `generate` does. With
        `reuse`, what a KV cache holds of the prompt is not computed again. Raises `RequestError` if the
        prompt cannot be used."""
        try:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            ids = check_ids(ids, self.config.vocab)
            return Work(ids, params, self.tokenizer.stream(prefix=ids), reuse)
        except TokenizerError as error:
            raise RequestError(str(error)) from error

    def batch(self, queue: int = 64) -> Batch:
        """Serve many requests at once, as many as `EngineOptions.parallel` says, while `queue` more may wait.
        See `runtime.batching.batch`, and `runtime.batching.service` for one that has a thread."""
        self.check_leads()
        return Batch(self.runner, queue)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits after each of `ids`, computed as a prompt is: [T, V] float32, on the engine's device.
        The plan does not count their memory. Raises `RequestError` if the ids are not the model's, or if they
        are more than the context holds."""
        self.check_leads()
        checked, context = check_ids(ids, self.config.vocab), self.plan.context
        if len(checked) > context:
            raise RequestError(
                f"{len(checked)} ids are more than the context of {context}; "
                f"give fewer{more_context(' or ', context, self.config.context)}"
            )
        return self.runner.logits(checked)

    @contextmanager
    def recording(self, path: str | PathLike[str]) -> Iterator[None]:
        """Inside, write what happens to each expert to a trace file, which `python -m tools.trace` reads.

        Over ranks, it is about this rank's layers, which it numbers from 0. Another rank than 0 may call
        `follow` inside.

        Raises `OptionError` if all experts are resident, since nothing happens to them then. Raises
        `TraceError` if the file cannot be written, at the latest on leaving.
        """
        runner, options = self.runner, self.options
        if runner.cache is None:
            raise OptionError(NOTHING_TO_TRACE)
        tiered = runner.plan.tiered
        header = Header(
            layers=self.config.layers,
            experts=self.config.experts,
            experts_per_token=self.config.experts_per_token,
            slots=runner.plan.slots_per_layer,
            spares=runner.plan.spares - SPARE_SLOTS * tiered,
            policy=policy_name(options.policy),
            seed=0,
            expert_bytes=runner.plan.blob_bytes,
            berths=runner.plan.berths * tiered,
            spare_berths=SPARE_BERTHS * tiered,
            in_berths=runner.cache.store.berths.contents() if tiered else (),
            options={name: getattr(options, name) for name in ("lookahead", "prefetch", "misses")}
            | {name: getattr(runner.plan, name) for name in RATES},
        )
        writer = TraceWriter.open(path, header)
        try:
            runner.alone(partial(runner.cache.record, writer))  # a trace begins between two forwards
        except BaseException:
            writer.close()
            raise
        try:
            yield
        finally:
            runner.cache.record(None)
            if not runner.turns.forked:
                writer.close()

    @property
    def rank(self) -> int:
        """This process's rank. Rank 0 takes requests, and each other one has to call `follow`."""
        return self.runner.company.rank if self.runner.company else 0

    @property
    def distributed(self) -> bool:
        """Whether several ranks compute."""
        return self.runner.company is not None

    def check_ranks(self) -> None:
        """Raises `RequestError` if another rank is gone. Then no request can be served any more."""
        if self.runner.company:
            self.runner.company.check()

    @property
    def rank_plans(self) -> RankPlans | None:
        """All ranks' plans, if the engine is distributed."""
        return self.runner.company.plans if self.runner.company else None

    def follow(self) -> None:
        """Compute what rank 0 asks for, until it closes its engine. Raises `RequestError` if a rank is gone,
        after which there is nothing more to do."""
        if not self.rank:
            raise RequestError("only ranks other than 0 can follow; this one takes requests")
        assert self.runner.company is not None
        self.runner.company.follow()

    def stats(self) -> Stats:
        """A copy of the counters since the engine was loaded. Rank 0 counts what all ranks' experts do."""
        return self.runner.stats()

    def check_leads(self) -> None:
        """Raises `RequestError` if the engine is closed, or is another rank's than 0."""
        self.runner.check_open()
        if self.rank:
            raise RequestError(f"this is rank {self.rank}, and rank 0 takes requests; call follow here")

    @property
    def model(self) -> Mixtral:
        """The network, or this rank's part of it. A closed engine has none. Do not write to its weights: a
        CPU's may be memory that cannot be written (see `EngineOptions.map`)."""
        return self.runner.model

    def close(self) -> None:
        """Release the weights and caches, after the running forward if there is one.
        Sessions of a closed engine raise `RequestError`."""
        self.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def closing(session: Session, tokens: Iterator[Token]) -> Iterator[Token]:
    """Pass tokens on, and close the session when the caller has taken all or abandons the rest."""
    try:
        yield from tokens
    finally:
        session.close()
