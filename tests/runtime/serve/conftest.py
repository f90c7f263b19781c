"""A running server on the demo model, and clients. Packages of the extra `serve` are imported where used: who
looks for tests of a GPU may lack them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from runtime import Engine, EngineOptions

if TYPE_CHECKING:
    from openai import OpenAI

    from tests.runtime.serve.served import Running


@pytest.fixture(scope="session")
def demo() -> Iterator[Engine]:
    with Engine.load(None, EngineOptions(device="cpu", dtype="float32", context=512, parallel=4)) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(demo: Engine) -> Iterator[Running]:
    """One server for all tests. What one test does to it, the next must survive."""
    from tests.runtime.serve.served import running

    with running(demo) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[OpenAI]:
    from openai import OpenAI

    with OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
        yield client
