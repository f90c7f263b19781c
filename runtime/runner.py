"""What all sessions of an engine share: a model in memory, and all it takes to compute with it.

Threads take turns with the model. A finalizer or signal handler that runs in the middle of a forward may call
`stats`, `give_kv` and `close`, which wait for no turn.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from model.checkpoint import Identity, MappedFiles
from model.errors import ModelError
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime.answer import Answer
from runtime.constraint import Constraints
from runtime.errors import RequestError
from runtime.experts.cache import ExpertCache
from runtime.gpu.decoder import make_decoder
from runtime.held import Held, HeldHere
from runtime.options import EngineOptions, SamplingParams
from runtime.passes import Company, Here, Pass, Passes
from runtime.planning.memory import release
from runtime.planning.plan import Plan
from runtime.process.ambient import default_settings
from runtime.process.shortage import shortage_as
from runtime.process.threads import usable_processors, using_threads
from runtime.process.turns import Nested, Turns
from runtime.requests import check_bias, check_room
from runtime.stats import Stats
from tokenizer import StreamDecoder

Result = TypeVar("Result")


class ModelRunner:
    """A loaded model, its KV caches and its counters."""

    def __init__(
        self,
        model: Mixtral,
        identity: Identity,
        cache: ExpertCache | None,
        plan: Plan,
        options: EngineOptions,
        eos_ids: frozenset[int],
        unused: Tensor | None,
        files: MappedFiles | None = None,
    ) -> None:
        """`cache` holds the experts unless all of them are resident. A text ends at `eos_ids`. `unused` [V]
        bool marks the ids that no token has. `files` are those that weights are views of."""
        self.model, self.cache, self.plan, self.options = model, cache, plan, options
        self.identity = identity
        self.eos_ids, self.unused, self.files = eos_ids, unused, files
        self.config = model.config
        self.device, self.dtype = plan.device, plan.dtype
        self.decoder = make_decoder(model, cache, options.graphs)
        self.passes: Passes = Here(model, self.decoder, self.device)
        self.company: Company | None = None  # the other ranks, if there are any
        self.processors = usable_processors()
        self.counters = Stats()
        self.constraints = Constraints(self.config.vocab)
        self.turns = Turns()
        self.idle_kvs: deque[KVCache] = deque()  # up to as many as the plan counts
        self.closed = False
        self.close_later = False  # after the running forward

    def forward(self, ids: list[int], kv: KVCache) -> Tensor:
        """Add `ids` to `kv`; return the logits after the last, [V] float32. Call it inside `working`. Raises
        as `alone` does."""
        return self.alone(partial(self.compute, ids, kv))

    def decode(self, tokens: list[int], kvs: list[KVCache]) -> Tensor:
        """Add one token to each of N texts; return the logits after it, [N, V] float32. Call it inside
        `working`. Raises as `alone` does."""
        return self.finish(self.begin_each(tokens, kvs))

    def begin(self, ids: list[int], kv: KVCache, past: int) -> Pass:
        """Begin a pass whose logits are wanted after the last token (see `Passes.begin`). Raises as `alone`
        does."""
        return self.begun(lambda: self.passes.begin(ids, kv, past))

    def begin_each(self, tokens: list[int], kvs: list[KVCache]) -> Pass:
        """Begin a pass of one token for each of N texts. Raises as `alone` does."""
        return self.begun(lambda: self.passes.begin_each(tokens, kvs))

    def begun(self, begin: Callable[[], Pass]) -> Pass:
        """With other ranks a pass begins now, and takes a turn for that. Otherwise there is nothing to do
        before it is finished."""
        return self.alone(begin) if self.company else lambda: begin()()

    def finish(self, begun: Pass) -> Tensor:
        """The logits of a pass, [N, V] float32. Raises as `alone` does."""

        def work() -> Tensor:
            with torch.inference_mode():
                return self.usable(begun())

        return self.alone(work)

    def compute(self, ids: list[int], kv: KVCache) -> Tensor:
        with torch.inference_mode():
            for logits in self.chunks(ids, kv):  # [1, V]
                row = logits[0]
            return self.usable(row)

    def chunks(self, ids: list[int], kv: KVCache, last: bool = True) -> Iterator[Tensor]:
        """Add `ids` to `kv` in the planned chunks, and yield what each pass gives (see `Passes.begin`). The
        next ones are under way meanwhile."""
        size, past, depth = self.plan.chunk, kv.length, self.passes.depth
        most = depth + (depth > 1)  # one waits at the first rank, which goes on at once when it has time
        under_way: deque[Pass] = deque()
        for start in range(0, len(ids), size):
            self.check_open()
            under_way.append(self.passes.begin(ids[start : start + size], kv, past + start, last))
            if len(under_way) == most:
                yield under_way.popleft()()
        while under_way:
            self.check_open()
            yield under_way.popleft()()

    def usable(self, logits: Tensor) -> Tensor:
        """Logits [..., V] in float32, with minus infinity for ids that no token has."""
        logits = logits.float()
        return logits if self.unused is None else logits.masked_fill(self.unused, -torch.inf)

    def logits(self, ids: list[int]) -> Tensor:
        """The logits after each of `ids`, computed as a prompt is: [T, V] float32. Raises as `alone` does."""
        kv = self.take_kv()
        try:
            return self.alone(partial(self.compute_all, ids, kv))
        finally:
            self.give_kv(kv)

    def compute_all(self, ids: list[int], kv: KVCache) -> Tensor:
        with self.working(), torch.no_grad():
            shape = len(ids), self.config.vocab
            logits = torch.empty(shape, dtype=torch.float32, device=self.device)  # [T, V]
            parts = zip(logits.split(self.plan.chunk), self.chunks(ids, kv, last=False), strict=True)
            for part, chunk in parts:  # [t, V] each
                part.copy_(chunk)
            return logits

    def answer(self, ids: list[int], params: SamplingParams, decoder: StreamDecoder) -> Answer:
        """Check a request for the text after `ids`, which `decoder` continues. Returns what will write it.
        Raises `RequestError` if it cannot be served."""
        self.check_open()
        check_bias(params.logit_bias, self.config.vocab)
        room = check_room(len(ids), self.plan.context, self.config.context)
        constraint = self.constraints.make(params, decoder, self.eos_ids)
        return Answer(ids, params, decoder, room, self.eos_ids, constraint)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, the calling thread computes with this engine's number of threads and with PyTorch's own
        settings, and memory that runs short is a `RequestError`.

        Every part of a request runs in such a block. No block holds a `yield`, since the program's own code
        runs there.
        """
        with (
            shortage_as(RequestError),
            using_threads(self.options.threads, self.processors),
            default_settings(self.device),
        ):
            yield

    def alone(self, work: Callable[[], Result]) -> Result:
        """Do `work` while no other thread computes with the model, and return its result.

        Raises `RequestError` if the engine is closed or a mapped file changes, before `work` or while it
        runs, if this process is a fork of the one that loaded it, or if the calling thread is already
        computing with it.
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

    def take_kv(self) -> KVCache:
        """An empty KV cache of the planned context, reused from an earlier session if there is one."""
        try:
            kv = self.idle_kvs.pop()
        except IndexError:
            with self.working():
                return self.new_kv()
        kv.truncate(0)
        return kv

    def new_kv(self) -> KVCache:
        plan = self.plan
        return KVCache.allocate(self.config, 1, plan.context, self.dtype, self.device, plan.kv)

    def copy_kv(self, source: KVCache, target: KVCache, length: int) -> None:
        """Have `target` hold the first `length` tokens of `source`. Raises as `alone` does."""
        self.alone(partial(self.passes.copy, source, target, length))

    def held(self, kv: KVCache, length: int) -> Held:
        """What is stored of a text's first `length` tokens, on all ranks. Raises `RequestError` if ranks
        store it differently. Over ranks, reading and writing it takes turns and raises as `alone` does."""
        return self.company.held(self.alone, kv, length) if self.company else HeldHere(kv, length)

    def give_kv(self, kv: KVCache) -> None:
        """Keep a KV cache for the next session."""
        if len(self.idle_kvs) < self.plan.parallel:
            self.idle_kvs.append(kv)
        if self.closed:
            self.idle_kvs.clear()

    def stats(self) -> Stats:
        """A copy of the counters, which may be taken in the middle of a forward."""
        others = self.company.count() if self.company else Stats()
        return self.counters + self.count_experts() + others

    def count_experts(self) -> Stats:
        """What this process's expert cache has counted."""
        return self.cache.count() if self.cache else Stats()

    def count_prompt(self, computed: int, reused: int) -> None:
        with self.turns.lock:
            self.counters.requests += 1
            self.counters.prompt_tokens += computed
            self.counters.reused_tokens += reused

    def count_tokens(self, count: int, seconds: float, first: bool = False) -> None:
        """Count new tokens, and the time that they took together. A request's first token pays for its
        prompt."""
        with self.turns.lock:
            self.counters.new_tokens += count
            if first:
                self.counters.prompt_seconds += seconds
                self.counters.first_token_seconds = seconds
            else:
                self.counters.decoded_tokens += count
                self.counters.decode_seconds += seconds

    def check_open(self) -> None:
        """Raises `RequestError` if the engine is closed, if this process is a fork, if another rank is gone,
        or if a mapped file is no longer what it was."""
        self.turns.check_process()
        if self.closed:
            raise RequestError("the engine is closed; load it again")
        if self.company:
            self.company.check()
        if self.files:
            try:
                self.files.check()
            except ModelError as error:
                raise RequestError(str(error)) from error

    def close(self) -> None:
        """Release the weights and caches, after the running forward if there is one.

        A request that waits for an expert fails at once, any other at the end of its forward. `close` waits
        for that end. If a finalizer or signal handler calls it in the thread that computes, or in one that
        this thread may wait for, it cannot wait, and the forward releases everything when it ends.
        """
        self.closed = True
        if self.turns.forked:  # the rest belongs to the process that loaded it
            return
        waited_for = bool(self.cache and self.cache.end())  # in a finalizer, by a forward
        if waited_for or (self.company and self.company.in_its_thread()):
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
        self.idle_kvs.clear()
        self.decoder = None
        for name in ("model", "passes"):
            self.__dict__.pop(name, None)
        if self.cache:
            self.cache.close()
        if self.files:
            self.files.close()
        if self.company:
            self.company.close()
