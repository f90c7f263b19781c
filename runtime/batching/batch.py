"""Many requests at once: their prompts chunk by chunk, and one more token for all texts in each forward.

    with engine.batch() as batch:
        running = [batch.add(Work(ids, params, engine.tokenizer.stream(ids))) for ids in prompts]
        while batch.busy:
            for request, result in batch.step():
                ...  # a Token, or the RequestError that ended the request

An expert that a layer lacks is brought once for all texts. What a request writes does not depend on who else
is served, to the bit where a CPU's kernels compute it.
"""

import time
from dataclasses import dataclass, field

from torch import Tensor

from runtime.answer import Answer, Token
from runtime.batching.promise import caveats
from runtime.batching.scheduler import Scheduler
from runtime.batching.texts import Text, Texts
from runtime.errors import RequestError
from runtime.options import SamplingParams
from runtime.requests import check_ids
from runtime.runner import ModelRunner
from tokenizer import StreamDecoder


@dataclass(frozen=True)
class Work:
    """What a request asks for."""

    ids: list[int]
    params: SamplingParams
    decoder: StreamDecoder  # continues the prompt's text: `Tokenizer.stream(ids)` or `.answer_stream(ids)`
    reuse: bool = True  # of what KV caches hold of the prompt


@dataclass(eq=False)
class Request:
    """A request that waits or is being served."""

    work: Work
    answer: Answer
    text: Text | None = None  # None until its prompt's first chunk is due
    reused: int = 0  # tokens of the prompt that a KV cache held
    token: int = -1  # the last one, which is not in the KV cache yet
    seconds: float = field(default=0.0, repr=False)  # that its prompt took

    @property
    def left(self) -> int:
        """How many tokens of the prompt have still to be computed."""
        return len(self.work.ids) - (len(self.text.ids) if self.text else 0)


Result = tuple[Request, Token | RequestError]


class Batch:
    """Requests that are served together. Use it from one thread at a time, and close it."""

    def __init__(self, runner: ModelRunner, queue: int = 64) -> None:
        """As many requests are served at once as the plan has KV caches, and `queue` more may wait."""
        self.runner, self.chunk = runner, runner.plan.chunk
        self.scheduler: Scheduler[Request] = Scheduler(runner.plan.parallel, queue, lambda r: r.left)
        self.texts = Texts(runner.plan.parallel, runner.take_kv)

    @property
    def caveats(self) -> list[str]:
        """Why a request's text may depend on the other requests. Empty if it does not."""
        return caveats(self.runner)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is being served."""
        return bool(self.scheduler.served or self.scheduler.waiting)

    def prepare(self, work: Work) -> Request:
        """Check what a request asks for. May be called from any thread. Raises `RequestError` if it cannot be
        served."""
        with self.runner.working():
            ids = check_ids(work.ids, self.runner.config.vocab)
            return Request(work, self.runner.answer(ids, work.params, work.decoder))

    def add(self, work: Work) -> Request:
        """Let a request wait for its turn. Raises `RequestError` if it cannot be served, and `QueueFull` if
        too many wait."""
        request = self.prepare(work)
        self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Give a request up, if it has not ended. Its place is free from the next step on."""
        self.scheduler.remove(request)
        if request.text is not None:
            request.text.busy = False
            request.text = None

    def step(self) -> list[Result]:
        """Compute a chunk of one prompt, or one more token for all texts. Returns what came of it. A request
        has ended after its last token, whose `finish` is set, or after an error."""
        self.scheduler.admit()
        if not self.scheduler.served:
            return []
        if self.scheduler.next_is_prompt():
            results = self.compute_chunk(self.scheduler.next_prompt())
        else:
            results = self.write(list(self.scheduler.writing))
        for request, result in results:
            if isinstance(result, RequestError) or result.finish:
                self.cancel(request)
        return results

    def compute_chunk(self, request: Request) -> list[Result]:
        """The next chunk of a prompt. The last one gives the first token."""
        runner, ids, began = self.runner, request.work.ids, time.perf_counter()
        try:
            with runner.working():
                if request.text is None:
                    request.text = self.texts.take(ids, request.work.reuse)
                    request.reused = len(request.text.ids)
                text, start = request.text, len(request.text.ids)
                text.cut(start)  # an interrupt can have left tokens in the KV cache that no one knows of
                chunk = ids[start : start + self.chunk]
                logits = runner.forward(chunk, text.kv)
                text.ids += chunk
                if request.left:
                    request.seconds += time.perf_counter() - began
                    return []
                token = self.take(request, logits)
        except RequestError as error:
            return [(request, error)]
        runner.count_prompt(len(ids) - request.reused, request.reused)
        runner.count_tokens(1, request.seconds + time.perf_counter() - began, first=True)
        self.scheduler.begin_writing(request)
        return [(request, token)]

    def write(self, requests: list[Request]) -> list[Result]:
        """The next token of each text, in one forward."""
        runner, began, results = self.runner, time.perf_counter(), list[Result]()
        texts = [request.text for request in requests if request.text is not None]
        for text in texts:
            text.cut(len(text.ids))
        try:
            with runner.working():
                rows = runner.decode([r.token for r in requests], [text.kv for text in texts])
                for request, text, row in zip(requests, texts, rows, strict=True):
                    text.ids.append(request.token)
                    results.append((request, self.settle(request, row)))
        except RequestError as error:  # of the forward, which was for all of them
            return [(request, error) for request in requests]
        runner.count_tokens(len(results), time.perf_counter() - began)
        return results

    def settle(self, request: Request, row: Tensor) -> Token | RequestError:
        """The token that a row of logits gives. An error is that request's alone."""
        try:
            return self.take(request, row)
        except RequestError as error:
            return error

    def take(self, request: Request, row: Tensor) -> Token:  # [V] float32
        token = request.answer.take(row)
        request.token = token.id
        return token

    def give_up(self) -> list[Request]:
        """Give up all requests that are being served, and return them: what a step leaves that failed as none
        should. What KV caches hold is still known."""
        served = [*self.scheduler.prompts, *self.scheduler.writing]
        for request in served:
            self.cancel(request)
        return served

    def close(self) -> None:
        """Give up all requests, and give the KV caches back to the engine."""
        scheduler = self.scheduler
        for request in (*scheduler.waiting, *scheduler.prompts, *scheduler.writing):
            self.cancel(request)
        while self.texts.all:
            self.runner.give_kv(self.texts.all.pop().kv)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
