"""A model, its tokenizer and its sessions: what other programs embed.

from runtime import Engine, SamplingParams

with Engine.load("path/to/checkpoint") as engine:
    for token in engine.generate("Once upon a time", SamplingParams(max_new_tokens=64)):
        print(token.text, end="", flush=True)
"""

import dataclasses
import operator
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, open_checkpoint
from model.config import ModelConfig
from model.errors import ModelError, quoted
from model.kv_cache import KVCache
from model.mixtral import Block, Mixtral
from model.moe import Product
from model.quant.expert import BlobExperts
from runtime.errors import DeviceError, LoadError, OptionError, RequestError
from runtime.experts.cache import ExpertCache
from runtime.experts.trace import Header, TraceWriter
from runtime.gpu.decoder import make_decoder
from runtime.gpu.warm_up import warm_ups
from runtime.loader import load_model, load_resident
from runtime.options import EngineOptions, SamplingParams
from runtime.planning.memory import release, reserve
from runtime.planning.planner import Plan
from runtime.planning.setup import Setup, make_plan
from runtime.process.ambient import unaffected
from runtime.process.interrupts import interrupts_told
from runtime.process.shortage import shortage_as
from runtime.process.threads import computing, start_threads, usable_processors
from runtime.process.turns import Nested, Turns
from runtime.requests import more_context
from runtime.session import DEFAULT_PARAMS, Session, Token
from runtime.stats import Stats
from tokenizer import Tokenizer, TokenizerError

MOST_PADDING = 256  # ids that a model has beyond its tokenizer's for a round number's sake
DEMO = Path(__file__).parent / "demo"
NOTHING_TO_TRACE = "all experts are resident, so there is nothing to trace; use --offload always"
LOAD_REMEDY = "lower --context, give the model fewer bits (python -m tools.quantize), or free some"

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
Judge = Callable[[Tokenizer, Plan, ModelConfig], None]
Result = TypeVar("Result")


class Engine:
    """A loaded model. No state outside this object: a process may hold several.

    Sessions may be used from several threads at once; their forwards take turns. What a finaliser or a
    signal's handler may call in the midst of a forward waits for no turn: `close`, `stats`, `Session.close`
    and leaving `recording`.
    """

    def __init__(
        self,
        model: Mixtral,
        tokenizer: Tokenizer,
        plan: Plan,
        dtype: torch.dtype,
        options: EngineOptions,
        cache: ExpertCache | None = None,
    ) -> None:
        self.options = options
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.config = model.config
        self.dtype = dtype
        self.cache = cache  # of experts, where they do not all stay on the device
        self.device = model.embed_tokens.weight.device
        self.decoder = make_decoder(model, cache, options.graphs)
        self.eos_ids = frozenset(model.config.eos_ids) | {i for i in tokenizer.ends if i < model.config.vocab}
        self.unused = unused_ids(self.config.vocab, tokenizer.vocab_size, self.eos_ids, self.device)
        self.usable = usable_processors()
        self.counters = Stats()
        self.turns = Turns()
        self.idle_caches: deque[KVCache] = deque(maxlen=1)  # one is what the plan counts
        self.closed = False
        self.close_later = False  # in the midst of a step, which has to end before memory goes

    @staticmethod
    def load(
        path: str | PathLike[str] | None = None,
        options: EngineOptions | None = None,
        progress: Bar | None = None,
        compiling: Bar | None = None,
        judge: Judge | None = None,
    ) -> "Engine":
        """Load the checkpoint in folder `path`; None is the small demo model that comes with the package.

        `progress(total)` is entered while weights are read, and gives a function that is called with
        each number of bytes read (`runtime.shell.progress.byte_bar` is one such); `compiling` likewise
        while a GPU's kernels are compiled, with each number of steps done. `judge` is called when the
        tokenizer, the plan and the configuration are known, and no weight has been read: what it raises ends
        the load.

        Raises `LoadError` for a checkpoint that cannot be used, `DeviceError` for what this machine cannot do
        (before anything is read), `OptionError` for options that do not fit the model.
        """
        options = options or EngineOptions()
        with interrupts_told(), shortage_as(DeviceError, LOAD_REMEDY), computing(options.threads):
            start_threads()
            return Engine.load_checked(
                DEMO if path is None else Path(path), options, progress, compiling, judge
            )

    @staticmethod
    def load_checked(
        path: Path,
        options: EngineOptions,
        progress: Bar | None,
        compiling: Bar | None,
        judge: Judge | None,
    ) -> "Engine":
        """`load`, but for memory that runs short."""
        try:
            checkpoint = open_checkpoint(path)
            setup = make_plan(checkpoint, options)
            tokenizer = Tokenizer.load(checkpoint.folder, options.chat_template, checkpoint.config.vocab)
            if tokenizer.vocab_size > checkpoint.config.vocab:
                raise LoadError(
                    f"{checkpoint.folder}: the tokenizer has {tokenizer.vocab_size} ids and the model "
                    f"{checkpoint.config.vocab}; they do not belong together"
                )
            if (missing := checkpoint.config.vocab - tokenizer.vocab_size) > MOST_PADDING:
                warnings.warn(
                    f"{checkpoint.folder}: the tokenizer lacks {missing} of the model's "
                    f"{checkpoint.config.vocab} ids; look whether the model has a newer tokenizer.model",
                    RuntimeWarning,
                    stacklevel=3,
                )
            if judge:
                judge(tokenizer, setup.plan, checkpoint.config)
            bar = progress(checkpoint.bytes) if progress else nullcontext(None)
            # whoever calls may be in inference mode, and what is made there cannot be filled by other threads
            with unaffected(setup.device), torch.inference_mode(False):
                with bar as advance:
                    model, cache = load(checkpoint, setup, options, advance)
                engine = None
                try:
                    engine = Engine(model, tokenizer, setup.plan, setup.dtype, options, cache)
                    engine.prepare(compiling)
                except BaseException:  # which may be kept, and with it what its frames refer to
                    if made := engine or cache:
                        made.close()
                    raise
        except (ModelError, TokenizerError) as error:
            raise LoadError(str(error)) from error
        return engine

    def prepare(self, compiling: Bar | None = None) -> None:
        """Do on a GPU what the first request would have to do. A CPU's system gives memory as it is used, and
        nothing is compiled there."""
        if self.device.type == "cuda":
            self.take_planned()
            self.warm_up(compiling)

    def take_planned(self) -> None:
        """Have a GPU's allocator hold what is planned and not yet there, a piece for the KV cache and one for
        activations."""
        release(self.device)  # what loading took
        self.give_cache(KVCache.allocate(self.config, 1, self.plan.context, self.dtype, self.device))
        reserve(self.device, self.plan.workspace_bytes)

    def warm_up(self, progress: Bar | None = None) -> None:
        """Compile kernels, set up libraries and make the first session's graphs, so that no request waits for
        that. Nothing else is different after it.

        Raises `DeviceError` if the device does not do it.
        """
        kv = self.take_cache()
        works = warm_ups(self.model, self.first_expert(), kv, self.forward)
        try:
            with progress(len(works)) if progress else nullcontext(None) as advance:
                for work in works:
                    work()
                    if advance:
                        advance(1)
        except RequestError as error:
            raise DeviceError(str(error)) from error
        if self.cache:
            self.cache.start_over()
        self.give_cache(kv)

    def first_expert(self) -> Product:
        """An expert as prompts are computed with; which one does not matter."""
        if self.cache:
            return self.cache.computed[0]
        return cast(BlobExperts, cast(Block, self.model.layers[0]).block_sparse_moe.experts).experts[0]

    @contextmanager
    def working(self) -> Iterator[None]:
        """While inside, the calling thread computes with this engine's number of threads and as if the
        program had set nothing for PyTorch, and memory that runs short is a `RequestError`. All that serves a
        request is in such a block, and no `yield`."""
        with (
            shortage_as(RequestError),
            computing(self.options.threads, self.usable),
            unaffected(self.device),
        ):
            yield

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams = DEFAULT_PARAMS
    ) -> Iterator[Token]:
        """Continue a text, or token ids, in a session of its own.

        A text gets the begin-of-sequence id in front; ids are taken as they are. Raises `RequestError` at
        once if the request cannot be served.
        """
        session = self.session()
        try:
            return closing(session, session.complete(prompt, params))
        except RequestError:
            session.close()
            raise

    def session(self, system: str | None = None) -> Session:
        """A new conversation, with a system message if given."""
        self.check_open()
        return Session(self, system)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits behind each of `ids`, computed as a prompt is: [T, V] float32, on the engine's device.
        The plan does not count them."""
        self.check_open()
        ids = self.check_ids(ids)
        if len(ids) > self.plan.context:
            raise RequestError(
                f"{len(ids)} ids are more than the context of {self.plan.context}; "
                f"give fewer{self.more_context(' or ')}"
            )
        cache = self.take_cache()
        try:
            return self.alone(partial(self.compute_logits, ids, cache))
        finally:
            self.give_cache(cache)

    def compute_logits(self, ids: list[int], cache: KVCache) -> Tensor:
        with self.working(), torch.no_grad():
            row = torch.tensor([ids], device=self.device)  # [1, T]
            shape = len(ids), self.config.vocab
            logits = torch.empty(shape, dtype=torch.float32, device=self.device)  # [T, V]
            chunks = zip(row.split(self.plan.chunk, 1), logits.split(self.plan.chunk), strict=True)
            for chunk, part in chunks:  # [1, t], [t, V]
                self.check_open()
                part.copy_(self.model(chunk, cache)[0])
            return logits

    def forward(self, ids: list[int], cache: KVCache) -> Tensor:
        """Add `ids` to the cache; return the logits behind the last, [V] float32. For callers that are inside
        `working`."""
        return self.alone(partial(self.compute, ids, cache))

    def compute(self, ids: list[int], cache: KVCache) -> Tensor:
        with torch.inference_mode():
            if self.decoder is not None and len(ids) == 1:
                row = self.decoder.step(ids[0], cache).clone()
            else:
                for start in range(0, len(ids), self.plan.chunk):
                    self.check_open()
                    chunk = torch.tensor([ids[start : start + self.plan.chunk]], device=self.device)
                    logits = self.model(chunk, cache, last=True)  # [1, 1, V]
                row = logits[0, 0].float()
            return row if self.unused is None else row.masked_fill(self.unused, -torch.inf)

    def alone(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, which computes with the model while nothing else does.

        Raises `RequestError` if the engine is closed, or comes to be meanwhile, in a fork of the process that
        loaded it, and if this very thread is computing with it already.
        """

        def turn() -> Result:
            self.check_open()
            result = work()
            self.check_open()
            return result

        try:
            return self.turns.take(turn)
        finally:
            if self.close_later:
                self.let_go()

    @contextmanager
    def recording(self, path: str | PathLike[str]) -> Iterator[None]:
        """While inside, write what becomes of experts to a trace (`runtime.experts.trace`), for
        `python -m tools.trace`.

        Raises `OptionError` if all experts are resident: then nothing does. Raises `TraceError` if the file
        cannot be written, at the latest on leaving.
        """
        if self.cache is None:
            raise OptionError(NOTHING_TO_TRACE)
        header = Header(
            layers=self.config.layers,
            experts=self.config.experts,
            experts_per_token=self.config.experts_per_token,
            slots=self.plan.slots_per_layer,
            spares=self.plan.spares,
            policy=self.options.policy,
            seed=0,
            expert_bytes=self.plan.blob_bytes,
            options={"lookahead": self.options.lookahead, "prefetch": self.options.prefetch},
        )
        writer = TraceWriter.open(path, header)
        try:
            self.alone(partial(self.cache.record, writer))  # from the beginning of a step on
        except BaseException:
            writer.close()
            raise
        try:
            yield
        finally:
            self.cache.record(None)
            if not self.turns.forked:
                writer.close()

    def stats(self) -> Stats:
        """A copy of the counters, as they are in the midst of whatever is going on."""
        cached = dataclasses.asdict(self.cache.count()) if self.cache else {}
        return dataclasses.replace(self.counters, **cached)

    def count_prompt(self, computed: int, reused: int) -> None:
        with self.turns.lock:
            self.counters.requests += 1
            self.counters.prompt_tokens += computed
            self.counters.reused_tokens += reused

    def count_token(self, seconds: float, first: bool) -> None:
        """Count a new token; the first of a request took all of its prompt's time."""
        with self.turns.lock:
            self.counters.new_tokens += 1
            if first:
                self.counters.prompt_seconds += seconds
                self.counters.first_token_seconds = seconds
            else:
                self.counters.decoded_tokens += 1
                self.counters.decode_seconds += seconds

    def take_cache(self) -> KVCache:
        """An empty KV cache of the planned context, re-used from an earlier session if there is one."""
        try:
            cache = self.idle_caches.pop()
        except IndexError:
            with self.working():
                return KVCache.allocate(self.config, 1, self.plan.context, self.dtype, self.device)
        cache.truncate(0)
        return cache

    def give_cache(self, cache: KVCache) -> None:
        """Keep a cache for the next session."""
        if not self.idle_caches:
            self.idle_caches.append(cache)
        if self.closed:
            self.idle_caches.clear()

    def more_context(self, before: str) -> str:
        """The remedy for a full context, after `before`; nothing if the model was made for no more."""
        return more_context(before, self.plan.context, self.config.context)

    def check_open(self) -> None:
        self.turns.check_process()
        if self.closed:
            raise RequestError("the engine is closed; load it again")

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids as plain integers. Raises `RequestError` unless they are one or more of the model's."""
        V = self.config.vocab
        try:
            items = None if isinstance(ids, bytes) else iter(ids)
        except TypeError:  # a number, or a tensor without dimensions
            items = None
        if items is None:
            raise RequestError(f"the prompt is of type {type(ids).__name__}; give a str or token ids")
        checked = []
        for i in items:
            try:
                index = operator.index(i)
            except TypeError:  # a fraction, a word, a row of a matrix
                index = -1
            if not 0 <= index < V:
                raise RequestError(
                    f"the prompt holds {quoted(i)}, and token ids are integers from 0 to {V - 1}"
                )
            checked.append(index)
        if not checked:
            raise RequestError("the prompt is empty; give at least one token")
        return checked

    def close(self) -> None:
        """Let go of the weights and caches. Sessions of a closed engine raise `RequestError`.

        A request that waits for an expert gets that error at once. Another one has it at the end of its step,
        for which this waits; but not where the step is this very thread's, which called this from a
        finaliser or a signal's handler: then the end of the step lets go.
        """
        self.closed = True
        if self.turns.forked:  # the rest belongs to the process that loaded it
            return
        if self.cache:
            self.cache.copies.end()
            if self.cache.copies.in_its_thread():  # a finaliser there; a step may be waiting for this thread
                self.close_later = True
                return
        self.let_go()

    def let_go(self) -> None:
        try:
            self.turns.take(self.drop)
        except Nested:
            self.close_later = True
        else:
            release(self.device)

    def drop(self) -> None:
        self.idle_caches.clear()
        self.decoder = None
        self.__dict__.pop("model", None)
        if self.cache:
            self.cache.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def load(
    checkpoint: Checkpoint,
    setup: Setup,
    options: EngineOptions,
    progress: Callable[[int], None] | None = None,
) -> tuple[Mixtral, ExpertCache | None]:
    """The model, and the cache of its experts if they are not all resident."""
    form, dtype, device = setup.form, setup.dtype, setup.device
    if setup.plan.resident:
        return load_resident(checkpoint, form, dtype, device, progress), None
    cache = ExpertCache.make(
        setup.plan, form, device, checkpoint.config.experts,
        options.policy, options.prefetch, options.link_gbps,
    )  # fmt: skip
    try:
        model = load_model(checkpoint, form, dtype, device, cache.layer, cache.arena.blob, progress)
        if options.lookahead and options.prefetch:
            model.look_ahead(options.lookahead)
    except BaseException:
        cache.close()
        raise
    return model, cache


def unused_ids(model: int, tokenizer: int, used: Iterable[int], device: torch.device) -> Tensor | None:
    """Which of the model's ids mean nothing, [V] bool: those that the tokenizer lacks, where a fine-tune
    padded the vocabulary. Ids in `used` do mean something: an end that only the configuration names.

    >>> unused_ids(6, 3, {2, 4}, torch.device("cpu")).tolist()
    [False, False, False, True, False, True]
    """
    if model == tokenizer:
        return None
    unused = torch.arange(model, device=device) >= tokenizer
    unused[[i for i in used if i < model]] = False
    return unused


def closing(session: Session, tokens: Iterator[Token]) -> Iterator[Token]:
    """Pass tokens on; whether or not all are taken, close the session behind them."""
    try:
        yield from tokens
    finally:
        session.close()
