"""Who may ask and how much: keys, hosts, other pages, sizes."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtime import Engine, OptionError
from runtime.serve.guard import Keys, Limits
from tests.leftovers import until
from tests.runtime.serve.served import Running, running

BODY = {"prompt": "x", "max_tokens": 1}
PATH = "/v1/completions"
HEADERS = "authorization,content-type,x-stainless-lang"  # what OpenAI's client sends from a page


@pytest.fixture(scope="module")
def guarded(demo: Engine) -> Iterator[Running]:
    with running(
        demo, Limits(body=2000, body_time=0.5), ("own", "other"), keys=Keys(["one", "two"]),
        origins=["http://localhost:3000"],
    ) as server:  # fmt: skip
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", ["one", "two"])
def test_a_key_lets_in(guarded: Running, key: str) -> None:
    assert guarded.post(PATH, BODY, headers=bearer(key)).status_code == 200
    assert guarded.get("/metrics", headers=bearer(key)).status_code == 200


WRONG = [{}, bearer("three"), bearer("one two"), bearer("on"), {"authorization": "Basic one"}]


@pytest.mark.parametrize("headers", WRONG)
@pytest.mark.parametrize("path", [PATH, "/metrics", "/v1/models", "/experts", "/experts/stream", "/nothing"])
def test_no_key_lets_nobody_in(guarded: Running, path: str, headers: dict[str, str]) -> None:
    answer = guarded.post(path, BODY, headers=headers) if path == PATH else guarded.get(path, headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_what_takes_no_key(guarded: Running) -> None:
    assert guarded.get("/health").json() == {"status": "ok"}
    assert guarded.get("/").status_code == guarded.get("/main.js").status_code == 200


def test_several_names_of_one_model(guarded: Running) -> None:
    ids = [model["id"] for model in guarded.get("/v1/models", headers=bearer("one")).json()["data"]]
    assert ids == ["own", "other"]
    answer = guarded.post(PATH, BODY | {"model": "other"}, headers=bearer("one"))
    assert answer.json()["model"] == "own"


def test_pages_from_elsewhere(guarded: Running, server: Running) -> None:
    """Only those that were named, and where none was, none."""
    wish = {"access-control-request-method": "POST", "access-control-request-headers": HEADERS}
    named, other = {"origin": "http://localhost:3000"}, {"origin": "http://evil.example"}
    allowed = httpx.options(guarded.url + PATH, headers=wish | named)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == named["origin"]
    answer = guarded.post(PATH, BODY, headers=bearer("one") | named)
    assert answer.headers["access-control-allow-origin"] == named["origin"]
    assert "retry-after" in answer.headers["access-control-expose-headers"]
    for asked, headers in ((guarded, other), (server, named)):
        refused = httpx.options(asked.url + PATH, headers=wish | headers)
        assert refused.status_code >= 400 and "access-control-allow-origin" not in refused.headers


def test_names_of_the_server(demo: Engine) -> None:
    """A page may have its own name resolve to this machine. Its visitor's browser says that name."""
    with running(demo, hosts={"localhost", "127.0.0.1"}) as server:
        assert server.post(PATH, BODY).status_code == 200
        assert server.get("/health", headers={"host": f"LOCALHOST:{server.port}"}).status_code == 200
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            answer = server.get("/", headers={"host": host})
            assert answer.status_code == 421 and answer.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body(guarded: Running, chunked: bool) -> None:
    text = b'{"prompt": "' + b"x" * 3000 + b'"}'
    content = iter([text[:1500], text[1500:]]) if chunked else text
    headers = bearer("one") | {"content-type": "application/json"}
    answer = guarded.post(PATH, content=content, headers=headers)
    assert answer.status_code == 413 and "2.0 KiB" in answer.json()["error"]["message"]
    assert guarded.post(PATH, BODY, headers=bearer("one")).status_code == 200


def test_a_slow_body(guarded: Running) -> None:
    with guarded.connect() as connection:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer one\r\ncontent-length: 100\r\n"
        connection.sendall((head + 'content-type: application/json\r\n\r\n{"prompt"').encode())
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive in 0.5 seconds" in answer


def test_a_client_that_leaves_in_the_middle_of_its_body(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is told of it: it is no mistake of the server's."""
    with server.connect() as connection:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
        connection.sendall((head + 'content-type: application/json\r\n\r\n{"prompt"').encode())
        time.sleep(0.1)
    until(lambda: not server.server.server_state.tasks)
    assert caplog.records == []


def test_two_lengths_of_one_body(guarded: Running) -> None:
    """A proxy may go by the other one, and take the body's rest for a request of another client."""
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer one\r\ncontent-type: application/json\r\n"
    )
    with guarded.connect() as connection:
        connection.sendall(f"{head}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        connection.sendall(b'f\r\n{"prompt": "x"}\r\n0\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n')
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("content", "works"),
    [(b"one\r\n# two\n", True), (b"\xef\xbb\xbfone\n", True), ("é\n".encode(), False), (b"a\tb\n", False)],
)
def test_files_of_keys(tmp_path: Path, content: bytes, works: bool) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    if works:
        assert Keys.read(file).know("one")
    else:
        with pytest.raises(OptionError, match="characters that no header carries"):
            Keys.read(file)


def test_keys() -> None:
    keys = Keys(["one", "two", "é"])
    assert all(keys.know(key) for key in ("one", "two", "é"))
    assert not any(keys.know(key) for key in ("", "One", "three", "\udc80"))
