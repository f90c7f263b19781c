"""One conversation: its KV cache, the ids in it, and the loop that generates new ones."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from os import PathLike, fsdecode
from pathlib import Path
from typing import Any

from torch import Tensor

from model.errors import quoted
from runtime.answer import Answer, Token
from runtime.batching.texts import common_prefix
from runtime.errors import RequestError
from runtime.options import SamplingParams
from runtime.requests import check_ids
from runtime.runner import ModelRunner
from runtime.saved import save_session
from tokenizer import StreamDecoder, Tokenizer, TokenizerError

DEFAULT_PARAMS = SamplingParams()


class Session:
    """A conversation. It keeps its KV cache between turns, and computes the tokens from the first one on that
    differs from the last turn's, at least the last one.

        session = engine.session(system="Be brief.")
        session.send("What is 6 times 7?")
        answer = "".join(token.text for token in session.generate())

    Use a session from one thread at a time. Several sessions may be used from several threads at once.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.kv = runner.take_kv()
        self.ids: list[int] = []  # the tokens whose keys and values are in `kv`
        self.requests = 0
        self.closed = self.computing = False

    def send(self, content: str) -> None:
        """Add the user's next message. Raises `RequestError` if the last one has not been answered."""
        if self.messages and self.messages[-1]["role"] == "user":
            raise RequestError("the last message has not been answered; call generate before sending another")
        self.messages.append({"role": "user", "content": content})

    def generate(self, params: SamplingParams = DEFAULT_PARAMS) -> Iterator[Token]:
        """Answer the message that was sent.

        The tokens that the caller takes become the assistant's message, even if the caller stops early. If it
        takes none, the message is empty. Raises `RequestError`, at once or when the first token is taken, if
        the request cannot be served. The session then forgets the user's message.
        """
        if not self.messages or self.messages[-1]["role"] != "user":
            raise RequestError("there is no message to answer; call send first")
        try:
            with self.runner.working():
                ids = self.tokenizer.encode_chat(self.messages)
            tokens = self.run(ids, params, self.tokenizer.answer_stream(ids))
        except (TokenizerError, RequestError) as error:
            self.messages.pop()
            raise error if isinstance(error, RequestError) else RequestError(str(error)) from error
        answer = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        return record(tokens, answer, self.messages)

    def complete(
        self, prompt: str | Sequence[int], params: SamplingParams = DEFAULT_PARAMS
    ) -> Iterator[Token]:
        """Continue a text, or token ids, outside of the conversation.

        The beginning that the prompt shares with the session's last text is not computed again. Raises
        `RequestError` if the prompt is empty, is too long, or holds ids that the model does not have.
        """
        return self.start(prompt, params)

    def start(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[Token]:
        """`complete`, called by what the user called: a warning names the user's line."""
        if isinstance(prompt, str):
            self.warn_of_control(prompt)
        try:
            with self.runner.working():
                ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                ids = check_ids(ids, self.runner.config.vocab)
            return self.run(ids, params, self.tokenizer.stream(prefix=ids))
        except TokenizerError as error:
            raise RequestError(str(error)) from error

    def warn_of_control(self, prompt: str) -> None:
        """Warn if a text spells control tokens, since the model will read them as letters."""
        if found := self.tokenizer.control_in(prompt):
            names = ", ".join(map(quoted, found[:4])) + (", ..." if len(found) > 4 else "")
            warnings.warn(
                f"the prompt spells {names}, which is text like any other there; conversations (--chat, "
                "Engine.session) have control tokens, and so have prompts of token ids",
                RuntimeWarning,
                stacklevel=4,
            )

    def run(self, ids: list[int], params: SamplingParams, decoder: StreamDecoder) -> Iterator[Token]:
        """Check a request, and return the iterator that serves it."""
        self.check_open()
        return self.decode_loop(ids, self.runner.answer(ids, params, decoder))

    def decode_loop(self, ids: list[int], answer: Answer) -> Iterator[Token]:
        runner, request = self.runner, self.begin_request()
        token: Token | None = None
        while token is None or token.finish is None:
            began = time.perf_counter()
            with runner.working():
                logits = self.prefill(ids) if token is None else self.step(token.id)  # [V]
                taken = answer.take(logits)
                runner.count_tokens(1, time.perf_counter() - began, first=token is None)
            yield (token := taken)
            if token.finish is None:
                self.check_current(request)

    def begin_request(self) -> int:
        self.check_open()
        self.requests += 1
        return self.requests

    def check_open(self) -> None:
        if self.closed:
            raise RequestError("the session is closed; open another")

    def check_current(self, request: int) -> None:
        """Raises `RequestError` if another request has begun, and `kv` holds its text."""
        self.check_open()
        if request != self.requests:
            raise RequestError("the session has begun another request since; take one at a time")

    def prefill(self, ids: list[int]) -> Tensor:  # -> [V] float32
        """Make `kv` hold exactly `ids`, and compute those that it lacks, at least the last."""
        reused = min(common_prefix(self.ids, ids), len(ids) - 1)
        del self.ids[reused:]  # first, so that an interrupt never leaves ids that `kv` does not hold
        self.kv.truncate(reused)
        logits = self.computed(self.runner.forward, ids[reused:], self.kv)
        self.ids = list(ids)
        self.runner.count_prompt(len(ids) - reused, reused)
        return logits

    def step(self, token: int) -> Tensor:  # -> [V] float32
        logits = self.computed(self.runner.decode, [token], [self.kv])[0]
        self.ids.append(token)
        return logits

    def computed(self, forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The result of a forward, during which a signal handler may close the session."""
        self.computing = True
        try:
            return forward(*arguments)
        finally:
            self.computing = False

    def save(self, path: str | PathLike[str]) -> None:
        """Write the conversation to a file, with which `Engine.restore` goes on. Between two tokens of an
        answer, the answer so far is part of it.

        A file of that name is replaced, by one that is complete and on the disk. Raises `RequestError` if it
        cannot be written.
        """
        self.check_open()
        self.runner.turns.check_process()
        if self.computing:
            raise RequestError("the session is computing a token; save it before or after")
        with self.runner.working():
            save_session(Path(fsdecode(path)), self.runner, self.messages, self.ids, self.kv)

    def close(self) -> None:
        """End the session, and give its KV cache back to the engine for the next one."""
        if not self.closed:
            self.closed = True
            if not self.computing:  # in a signal handler the forward may still write to `kv`
                self.runner.give_kv(self.kv)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def record(
    tokens: Iterator[Token], answer: dict[str, str], messages: list[dict[str, str]]
) -> Iterator[Token]:
    """Pass tokens on, and add their texts to `answer`. If the first token fails, remove question and answer
    from the end of `messages`."""
    begun = False
    try:
        for token in tokens:
            begun = True
            answer["content"] += token.text
            yield token
    except (RequestError, KeyboardInterrupt):
        if not begun and messages[-1] is answer:
            del messages[-2:]
        raise
