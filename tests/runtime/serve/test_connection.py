"""Connections of slow clients are cut, and so are those beyond the limit."""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPResponse

import pytest

from runtime import Engine
from runtime.serve.guard import Limits
from tests.leftovers import PATIENCE, until
from tests.runtime.serve.served import Running, running

LIMITS = Limits(
    header=2000, body=8 << 20, header_time=0.2, write_time=0.4, idle_time=0.2, beat=0.05, connections=3
)
HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def patient(demo: Engine) -> Iterator[Running]:
    """Waits for headers: for tests of something else, on a machine that may be."""
    with running(demo, replace(LIMITS, header_time=60.0)) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(demo: Engine) -> Iterator[Running]:
    with running(demo, LIMITS) as server:
        yield server


def cut_after(connection: socket.socket, drip: bytes = b"") -> float:
    """Seconds until the server ends a connection, to which `drip` is sent again and again."""
    began = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - began < PATIENCE:
        try:
            if drip:
                connection.sendall(drip)
            if not connection.recv(65536):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


@pytest.mark.parametrize("drip", [b"", b"x"])
@pytest.mark.parametrize("sent", [b"", HEAD])
def test_a_header_that_does_not_come(hasty: Running, sent: bytes, drip: bytes) -> None:
    """One that comes byte by byte is no better."""
    with hasty.connect() as connection:
        connection.sendall(sent)
        assert 0.1 < cut_after(connection, drip) < 4


def test_the_second_header_of_a_connection(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.sendall(HEAD + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(HEAD)
        assert 0.1 < cut_after(connection, b"x") < 4


def test_an_idle_connection(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.sendall(HEAD + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert 0.1 < cut_after(connection) < 4


@pytest.mark.parametrize("cut", [1, 4000])
def test_a_large_header(patient: Running, cut: int) -> None:
    """Refused when all of it is there, and before."""
    sent = HEAD + b"x-large: " + b"x" * 5000 + b"\r\n\r\n"
    with patient.connect() as connection:
        connection.sendall(sent[:-cut])
        time.sleep(0.05)
        connection.sendall(sent[-cut:])
        status, error = refusal(connection)
        assert status == 431 and error["message"] == "the header is larger than 2.0 KiB; send less"


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01 hello\r\n\r\n", HEAD + b"content-length: -1\r\n\r\n", b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_no_request(patient: Running, sent: bytes) -> None:
    """Uvicorn itself would answer in plain text."""
    with patient.connect() as connection:
        connection.sendall(sent)
        status, error = refusal(connection)
        assert status == 400 and error["message"].startswith("this is no request of HTTP/1.1: ")
        assert "bytearray" not in error["message"]


def test_no_request_after_the_response(patient: Running, caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing more to say then."""
    with patient.connect() as connection:
        head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 415")
        connection.sendall(b"no chunk\r\n")
        assert cut_after(connection) < 30
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def refusal(connection: socket.socket) -> tuple[int, dict[str, str]]:
    """The status and the error that a connection gives before it ends."""
    connection.settimeout(PATIENCE)
    response = HTTPResponse(connection)
    response.begin()
    assert response.getheader("content-type") == "application/json"
    found = response.status, json.loads(response.read())["error"]
    assert connection.recv(1) == b""
    return found


def test_a_client_that_does_not_read(hasty: Running, demo: Engine) -> None:
    """Its answer of some megabytes is more than systems hold on to for it."""
    longest = max(range(demo.config.vocab), key=lambda i: len(str(demo.tokenizer.vocabulary.decoded[i])))
    length = len(demo.tokenizer.decode([longest]))
    body = b'{"tokens": [' + b",".join([str(longest).encode()] * (8_000_000 // length)) + b"]}"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", hasty.port))
        head = f"POST /detokenize HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        until(lambda: not hasty.server.server_state.connections)
        assert cut_after(connection) < 30  # what the system holds can still be read
    assert hasty.get("/health").status_code == 200


def test_more_connections_than_there_may_be(patient: Running) -> None:
    connections = [patient.connect() for _ in range(4)]
    for connection in connections[:3]:
        connection.sendall(HEAD + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert cut_after(connections[3]) < 30
    for connection in connections:
        connection.close()


def test_a_stream_without_news_gives_signs_of_life(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /experts/stream HTTP/1.1\r\nhost: x\r\n\r\n")
        found, end = b"", time.monotonic() + PATIENCE
        while b": nothing new" not in found:
            assert time.monotonic() < end
            found += connection.recv(4096)
