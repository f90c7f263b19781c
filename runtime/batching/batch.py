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
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from runtime.answer import Answer, Token
from runtime.batching.promise import caveats
from runtime.batching.scheduler import Scheduler
from runtime.batching.texts import Text, Texts, common_prefix
from runtime.errors import RequestError
from runtime.options import SamplingParams
from runtime.passes import Pass
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
    begun: int = 0  # tokens of the prompt that are computed or in a turn
    turns: int = 0  # that it is part of, and that are under way
    over: bool = False  # it has ended or was given up, and leaves when its turns are over
    seconds: float = field(default=0.0, repr=False)  # that its prompt took

    @property
    def left(self) -> int:
        """How many tokens of the prompt are in no turn yet."""
        return 0 if self.over else len(self.work.ids) - self.begun


Result = tuple[Request, Token | RequestError]


@dataclass(frozen=True, eq=False)
class Turn:
    """A pass under way: a `chunk` of one request's prompt, or else the next token of each request."""

    requests: list[Request]
    ids: list[int]
    past: list[int]  # tokens of each text before it
    chunk: bool
    begun: Pass
    done: dict[Request, Token | RequestError] = field(default_factory=dict)  # what has come of it


class Batch:
    """Requests that are served together. Use it from one thread at a time, and close it."""

    def __init__(self, runner: ModelRunner, queue: int = 64) -> None:
        """As many requests are served at once as the plan has KV caches, and `queue` more may wait."""
        self.runner, self.chunk = runner, runner.plan.chunk
        self.turns: deque[Turn] = deque()  # under way, the oldest first
        self.outcomes: dict[Turn, list[Result]] = {}  # which the caller does not have yet
        self.interrupted = False  # a step, before its end
        self.scheduler: Scheduler[Request] = Scheduler(
            runner.plan.parallel, queue, lambda request: request.left, runner.passes.depth
        )
        self.texts = Texts(runner.plan.parallel, runner.take_kv, runner.copy_kv)

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
        """Give a request up, if it has not ended. Its place is free from the next step on, or over several
        ranks when the passes are over that it is part of."""
        request.over = True
        if not request.turns:
            self.scheduler.remove(request)
            if request.text is not None:
                request.text.busy = False
                request.text = None

    def step(self) -> list[Result]:
        """Compute a chunk of one prompt, or one more token for several texts. Returns what came of it. A
        request has ended after its last token, whose `finish` is set, or after an error."""
        if self.interrupted:
            self.tidy()
        self.interrupted = True  # until the end of this step
        results: list[Result] = []
        if not self.outcomes:  # otherwise an interrupted step left them
            results += self.begin_turns()
            if self.turns:
                turn = self.turns[0]
                self.outcomes[turn] = self.finish(turn)
        self.tidy()
        results += [result for outcome in self.outcomes.values() for result in outcome]
        for request, result in results:
            if isinstance(result, RequestError) or result.finish:
                self.cancel(request)
        self.outcomes, self.interrupted = {}, False
        return results

    def tidy(self) -> None:
        """Have everything follow from what is under way and what has been computed, wherever an interrupt may
        have come."""
        if self.turns and self.turns[0] in self.outcomes:
            self.turns.popleft()
        for request in self.scheduler.all:
            turns = [turn for turn in self.turns if request in turn.requests]
            request.turns = len(turns)
            if request.text is not None:
                ends = [turn.past[0] + len(turn.ids) for turn in turns if turn.chunk]
                request.begun = max([len(request.text.ids), *ends])
            if request.over:
                self.cancel(request)
        self.scheduler.come_back([request for request in self.scheduler.away if not request.turns])
        in_use = {request.text for request in self.scheduler.all}
        for text in self.texts.all:
            text.busy = text in in_use

    def begin_turns(self) -> list[Result]:
        """Begin as many turns as are useful. Returns errors of those that could not be begun."""
        self.scheduler.admit()
        while len(self.turns) < self.runner.passes.depth:
            prompt, group = self.scheduler.next_turn()
            if (prompt is None and not group) or (prompt and self.is_under_way(prompt)):
                break
            try:
                with self.runner.working():
                    turn = self.begin_each(group) if prompt is None else self.begin_chunk(prompt)
            except RequestError as error:
                return [(request, error) for request in (group if prompt is None else [prompt])]
            self.turns.append(turn)
            self.tidy()
        return []

    def is_under_way(self, request: Request) -> bool:
        """Whether a prompt should wait for its beginning, which is under way for another request. A few
        tokens alike are no reason to wait."""
        if request.text is not None or not request.work.reuse or not self.turns:
            return False
        ids, known = request.work.ids, self.texts.longest(request.work.ids)[0]
        others = [turn.requests[0] for turn in self.turns if turn.chunk]
        most = max((common_prefix(other.work.ids[: other.begun], ids) for other in others), default=0)
        return 2 * (most - known) > min(self.chunk, len(ids) - known)

    def begin_chunk(self, request: Request) -> Turn:
        """The next chunk of a prompt."""
        ids = request.work.ids
        if request.text is None:
            request.text = self.texts.take(ids, request.work.reuse)
            request.reused = request.begun = len(request.text.ids)
        start = request.begun
        chunk = ids[start : start + self.chunk]
        return Turn([request], chunk, [start], True, self.runner.begin(chunk, request.text.kv, start))

    def begin_each(self, requests: list[Request]) -> Turn:
        """The next token of each text, in one forward."""
        texts = [request.text for request in requests if request.text is not None]
        for text in texts:
            text.cut(len(text.ids))  # an interrupt can have left tokens in the KV cache that no one knows of
        tokens = [request.token for request in requests]
        begun = self.runner.begin_each(tokens, [text.kv for text in texts])
        return Turn(requests, tokens, [len(text.ids) for text in texts], False, begun)

    def finish(self, turn: Turn) -> list[Result]:
        """What comes of a turn. May be done again after an interrupt."""
        if all(request.over for request in turn.requests):
            return []
        return self.finish_chunk(turn) if turn.chunk else self.write(turn)

    def finish_chunk(self, turn: Turn) -> list[Result]:
        """The last chunk of a prompt gives the first token."""
        runner, (request,), began = self.runner, turn.requests, time.perf_counter()
        assert request.text is not None
        try:
            with runner.working():
                self.cut_back(turn)
                logits = runner.finish(turn.begun)[0]  # [V]
                request.text.ids[turn.past[0] :] = turn.ids
                if len(request.text.ids) < len(request.work.ids):
                    request.seconds += time.perf_counter() - began
                    return []
                if request not in turn.done:  # by a step that was interrupted
                    turn.done[request] = self.take(request, logits)
        except RequestError as error:
            if runner.company:  # the other ranks may lack what this one has of the text, if a copy failed
                request.text.cut(0)
            return [(request, error)]
        runner.count_prompt(len(request.work.ids) - request.reused, request.reused)
        runner.count_tokens(1, request.seconds + time.perf_counter() - began, first=True)
        self.scheduler.begin_writing(request)
        return list(turn.done.items())

    def write(self, turn: Turn) -> list[Result]:
        """The next token of each text that is still wanted."""
        runner, began, done = self.runner, time.perf_counter(), turn.done
        wanted = [request for request in turn.requests if not request.over]
        try:
            with runner.working():
                self.cut_back(turn)
                rows = runner.finish(turn.begun)  # [N, V]
                each = zip(turn.requests, turn.ids, turn.past, rows, strict=True)
                for request, token, past, row in each:
                    assert request.text is not None
                    request.text.ids[past:] = [token]
                    if not request.over and request not in done:  # by a step that was interrupted
                        done[request] = self.settle(request, row)
        except RequestError as error:  # of the forward, which was for all of them
            return [(request, error) for request in wanted]
        runner.count_tokens(len(done), time.perf_counter() - began)
        return list(done.items())

    def cut_back(self, turn: Turn) -> None:
        """Forget what an interrupted step has done of a turn, which is now done again."""
        for request, past in zip(turn.requests, turn.past, strict=True):
            if request.text is not None:
                request.text.cut(past)

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
        scheduler = self.scheduler
        served = scheduler.all
        self.turns.clear()
        self.outcomes = {}
        for request in served:
            request.turns = 0
            self.cancel(request)
        return served

    def close(self) -> None:
        """Give up all requests, and give the KV caches back to the engine."""
        self.give_up()
        for request in list(self.scheduler.waiting):
            self.cancel(request)
        while self.texts.all:
            self.runner.give_kv(self.texts.all.pop().kv)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
