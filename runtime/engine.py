"""A model, its tokenizer and its sessions: what other programs embed.

from runtime import Engine, SamplingParams

with Engine.load("path/to/checkpoint") as engine:
    for token in engine.generate("Once upon a time", SamplingParams(max_new_tokens=64)):
        print(token.text, end="", flush=True)
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.errors import ModelError
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime.device import choose_device, choose_dtype
from runtime.errors import DeviceError, LoadError, OptionError, RequestError
from runtime.memory import free_device_bytes
from runtime.options import EngineOptions, SamplingParams
from runtime.planner import PREFILL_CHUNK, Plan, check_budget, plan
from runtime.session import DEFAULT_PARAMS, Session, Token
from runtime.stats import Stats
from runtime.units import parse_bytes
from tokenizer import Tokenizer, TokenizerError

DEMO = Path(__file__).parent / "demo"
DEFAULT_CONTEXT = 4096

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]


class Engine:
    """A loaded model. No state outside this object: a process may hold several.

    Sessions may be used from several threads at once; their forwards take turns.
    """

    def __init__(self, model: Mixtral, tokenizer: Tokenizer, plan: Plan, dtype: torch.dtype) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.config = model.config
        self.dtype = dtype
        self.device = model.embed_tokens.weight.device
        self.eos_ids = frozenset(model.config.eos_ids or (tokenizer.eos_id,))
        self.counters = Stats()
        self.lock = threading.Lock()
        self.idle_caches: list[KVCache] = []
        self.closed = False

    @staticmethod
    def load(
        path: str | PathLike[str] | None = None,
        options: EngineOptions | None = None,
        progress: Bar | None = None,
    ) -> "Engine":
        """Load the checkpoint in folder `path`; None is the small demo model that comes with the package.

        `progress(total)` is entered while weights are read, and gives a function that is called with each
        number of bytes read (`runtime.progress.byte_bar` is one such).

        Raises `LoadError` for a checkpoint that cannot be used, `DeviceError` for what this machine cannot do
        (before anything is read), `OptionError` for options that do not fit the model.
        """
        options = options or EngineOptions()
        try:
            checkpoint = open_checkpoint(DEMO if path is None else Path(path))
            planned, device, dtype = make_plan(checkpoint.config, options)
            tokenizer = Tokenizer.load(checkpoint.folder)
            if tokenizer.vocab_size > checkpoint.config.vocab:
                raise LoadError(
                    f"{checkpoint.folder}: the tokenizer has {tokenizer.vocab_size} ids and the model "
                    f"{checkpoint.config.vocab}; they do not belong together"
                )
            model = Mixtral(checkpoint.config, dtype, device).requires_grad_(False)
            with progress(checkpoint.bytes) if progress else nullcontext(None) as advance:
                checkpoint.load(model, advance)
        except (ModelError, TokenizerError) as error:
            raise LoadError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"out of device memory while loading; lower --context or free the GPU ({error})"
            ) from error
        return Engine(model, tokenizer, planned, dtype)

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
        """The logits behind each of `ids`, computed as a prompt is: [T, V] float32."""
        self.check_open()
        self.check_ids(ids)
        if len(ids) > self.plan.context:
            raise RequestError(
                f"{len(ids)} ids are more than the context of {self.plan.context}; raise --context"
            )
        cache = self.take_cache()
        try:
            with self.lock, torch.inference_mode():
                chunks = torch.tensor([list(ids)], device=self.device).split(PREFILL_CHUNK, dim=1)
                return torch.cat([self.model(chunk, cache)[0].float() for chunk in chunks])
        finally:
            self.give_cache(cache)

    def forward(self, ids: list[int], cache: KVCache) -> Tensor:
        """Add `ids` to the cache; return the logits that follow the last, for ids that are tokens: [V]
        float32."""
        with self.lock, torch.inference_mode():
            self.check_open()
            for start in range(0, len(ids), PREFILL_CHUNK):
                chunk = torch.tensor([ids[start : start + PREFILL_CHUNK]], device=self.device)
                logits = self.model(chunk, cache, last=True)  # [1, 1, V]
            return logits[
                0, 0, : self.tokenizer.vocab_size
            ].float()  # fine-tunes may pad V: such ids mean nothing

    def stats(self) -> Stats:
        """A copy of the counters."""
        return dataclasses.replace(self.counters)

    def take_cache(self) -> KVCache:
        """An empty KV cache of the planned context, re-used from an earlier session if there is one."""
        with self.lock:
            cache = self.idle_caches.pop() if self.idle_caches else None
        if cache is None:
            return KVCache.allocate(self.config, 1, self.plan.context, self.dtype, self.device)
        cache.truncate(0)
        return cache

    def give_cache(self, cache: KVCache) -> None:
        if not self.closed:
            self.idle_caches.append(cache)

    def check_open(self) -> None:
        if self.closed:
            raise RequestError("the engine is closed; load it again")

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises `RequestError` unless ids are one or more of the model's."""
        if not len(ids):
            raise RequestError("the prompt is empty; give at least one token")
        V = self.config.vocab
        for i in ids:
            if not isinstance(i, int) or not 0 <= i < V:
                raise RequestError(f"the prompt holds {i!r}, and token ids are integers from 0 to {V - 1}")

    def check_bias(self, params: SamplingParams) -> None:
        last = self.tokenizer.vocab_size - 1
        for i in params.logit_bias:
            if i > last:
                raise RequestError(f"logit_bias names token {i}, and ids end at {last}")

    def close(self) -> None:
        """Let go of the weights and caches. Sessions of a closed engine raise `RequestError`."""
        with self.lock:
            self.closed = True
            self.idle_caches.clear()
            self.__dict__.pop("model", None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def make_plan(config: ModelConfig, options: EngineOptions) -> tuple[Plan, torch.device, torch.dtype]:
    """What an engine with these options takes, where and in which dtype.

    Raises `DeviceError` if that is more than there is, or than the options allow.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.context is not None and options.context > config.context:
        raise OptionError(
            f"context is {options.context}, and this model was made for at most {config.context}"
        )
    planned = plan(config, dtype, options.context or min(DEFAULT_CONTEXT, config.context))
    free = free_device_bytes(device)
    name, limit = ("vram", options.vram) if device.type == "cuda" else ("ram", options.ram)
    budget = parse_bytes(limit, whole=free) if limit else free
    if budget is not None:
        check_budget(planned, budget, f"memory on {device}" + (f" under --{name} {limit}" if limit else ""))
    return planned, device, dtype


def closing(session: Session, tokens: Iterator[Token]) -> Iterator[Token]:
    """Pass tokens on; whether or not all are taken, close the session behind them."""
    try:
        yield from tokens
    finally:
        session.close()
