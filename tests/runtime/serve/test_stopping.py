"""A server that is told to stop, clients that go away, and a queue that is full."""

import json
import threading
import time

import httpx
import openai
import pytest

from runtime import Engine
from tests.leftovers import until
from tests.runtime.serve.served import Running, running

LONG = {"prompt": "def read_bytes(obj):", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
STREAM = LONG | {"stream": True}
PATH = "/v1/completions"


def events(stream: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]


def idle(server: Running, seconds: float = 60) -> bool:
    """Whether the service has nothing to do, within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        counts = server.served.service.counts()
        if counts.running == counts.queued == 0:
            return True
        time.sleep(0.01)
    return False


def test_more_texts_than_can_ever_wait(demo: Engine) -> None:
    """Status 429 would have the client ask for ever."""
    with running(demo, queue=1) as server:
        answer = server.post(PATH, LONG | {"n": 6})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"
        assert server.post(PATH, LONG | {"n": 5, "max_tokens": 1}).status_code == 200


def test_a_stopped_server_lets_answers_end_and_takes_no_more(demo: Engine) -> None:
    with running(demo, grace=60) as server:
        kept = httpx.Client(base_url=server.url)
        kept.get("/health")
        with httpx.stream("POST", server.url + PATH, json=STREAM, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.served.stopping.set()
            assert kept.get("/health").json() == {"status": "stopping"}
            refused = kept.post(PATH, json=LONG)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            server.server.should_exit = True
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        kept.close()


def test_without_grace_an_answer_is_broken_off_with_a_reason(demo: Engine) -> None:
    found = {}

    def ask(server: Running) -> None:
        answer = server.post(PATH, LONG | {"max_tokens": 480})
        found["status"], found["code"] = answer.status_code, answer.json()["error"]["code"]

    with running(demo, grace=0) as server:
        whole = threading.Thread(target=ask, args=[server])
        whole.start()
        until(lambda: server.served.service.counts().running == 1)
        with httpx.stream("POST", server.url + PATH, json=STREAM | {"max_tokens": 480}, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.should_exit = True
            *_, last = [line for line in lines if line]
        whole.join()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert found == {"status": 503, "code": "stopping"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(server: Running, stream: bool) -> None:
    before = server.served.engine.stats().new_tokens
    with server.connect() as connection:
        body = json.dumps(STREAM | {"stream": stream, "max_tokens": 480}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        while server.served.engine.stats().new_tokens < before + 3:
            time.sleep(0.005)
    assert idle(server)
    assert server.served.engine.stats().new_tokens - before < 450


def test_several_texts_are_given_up_together(server: Running) -> None:
    with httpx.stream(
        "POST", server.url + PATH, json=STREAM | {"n": 8, "temperature": 1}, timeout=60
    ) as stream:
        next(stream.iter_lines())
    assert idle(server)


def test_a_full_queue(demo: Engine) -> None:
    """429 at once, with the time after which to try again. What was taken on is not touched."""
    asked = STREAM | {"max_tokens": 200}  # which are being written while the others come
    with running(demo, queue=1) as server:
        streams = [httpx.Client(timeout=60) for _ in range(demo.plan.parallel + 1)]
        begun = [
            client.send(client.build_request("POST", server.url + PATH, json=asked), stream=True)
            for client in streams
        ]
        refused = server.post(PATH, LONG)
        assert server.post(PATH, LONG | {"n": demo.plan.parallel + 2}).status_code == 400  # never possible
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="demo", prompt="x", n=2)
        texts = [events(stream) for stream in begun]
        assert all(text[-1] == "[DONE]" for text in texts)
        assert idle(server)
        for each in streams:
            each.close()


def test_texts_are_those_of_requests_alone(server: Running, demo: Engine) -> None:
    """Whoever else is served."""
    prompts = ["def read_bytes(obj):", "import ", "class A:\n    def", "x = 1\ny = "] * 2
    words = {"max_tokens": 10, "seed": 3}
    alone = {
        prompt: server.post(PATH, words | {"prompt": prompt}).json()["choices"][0]["text"]
        for prompt in prompts
    }
    found: list[tuple[str, str]] = []

    def ask(prompt: str) -> None:
        answer = server.post(PATH, words | {"prompt": prompt}).json()
        found.append((prompt, answer["choices"][0]["text"]))

    threads = [threading.Thread(target=ask, args=[prompt]) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted((prompt, alone[prompt]) for prompt in prompts)


def test_a_prompts_beginning_is_reused_unless_the_request_forbids_it(server: Running) -> None:
    body = {"prompt": "for index, name in enumerate(names):", "max_tokens": 2, "temperature": 0}
    answers = [server.post(PATH, body | {"cache_prompt": reuse}).json() for reuse in (False, True, False)]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, answers[0]["usage"]["prompt_tokens"] - 1, 0]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
