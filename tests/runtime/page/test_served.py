"""The page with the server that it is for, on the demo with slots for half of its experts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from dev.chromium import Chromium
from dev.chromium_page import Page
from dev.page_figure import set_fields
from runtime import Engine, EngineOptions, SamplingParams
from tests.leftovers import until
from tests.runtime.page.doing import ask, turns, wait_for

if TYPE_CHECKING:
    from tests.runtime.serve.served import Running

pytestmark = pytest.mark.browser

PROMPT = "def read_bytes(obj):"
TEXT = {"mode": "text", "temperature": "0.3", "seed": "4", "max_tokens": "30"}


@pytest.fixture(scope="module")
def offloaded() -> Iterator[Engine]:
    options = EngineOptions(
        device="cpu", dtype="float32", context=256, parallel=2, offload="always", slots=4, link_gbps=2
    )
    with Engine.load(None, options) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(offloaded: Engine) -> Iterator[Running]:
    from tests.runtime.serve.served import running

    with running(offloaded) as server:
        yield server


@pytest.fixture(scope="module")
def real(browser: Chromium, server: Running) -> Iterator[Page]:
    page = Page(browser, server.url + "/")
    page.wait("document.querySelector('#model').textContent === 'demo'")
    yield page
    assert page.complaints == []
    assert all(address.startswith((server.url, "data:")) for address in page.addresses)
    page.close()


@pytest.fixture
def fresh(real: Page, server: Running) -> Page:
    real.evaluate("localStorage.clear()")
    real.go(server.url + "/")
    real.wait("document.querySelectorAll('#picture i').length === 64")
    return real


def test_a_text_is_what_the_engine_writes(fresh: Page, offloaded: Engine) -> None:
    params = SamplingParams(temperature=0.3, top_p=1, seed=4, max_new_tokens=30)  # OpenAI's top_p
    expected = "".join(token.text for token in offloaded.generate(PROMPT, params))
    set_fields(fresh, TEXT)
    ask(fresh, PROMPT)
    wait_for(fresh, "done")
    shown = "document.querySelector('article.assistant .plain').textContent"
    assert fresh.evaluate(shown) == expected
    assert fresh.text("article.assistant .note") == "stopped at the limit of tokens"
    assert fresh.text("article.assistant .figures").startswith("30 tokens · first after ")
    fresh.press("Alt+r")
    fresh.wait("document.querySelector('article.assistant').dataset.state === 'done'")
    assert fresh.evaluate(shown) == expected


def test_a_conversation_that_outgrows_its_context(fresh: Page) -> None:
    set_fields(fresh, {"temperature": "0", "max_tokens": "8", "system": "Write Python."})
    for number in range(1, 7):
        ask(fresh, f"def f{number}(self):" + "\n    return self.name" * 10)
        fresh.wait(f"document.querySelectorAll('article').length === {2 * number}")
        wait_for(fresh, "done")
    assert [role for role, _ in turns(fresh)] == ["user", "assistant"] * 6
    assert all(text for _, text in turns(fresh))
    assert "the context is full" in fresh.text(".forgotten .note")
    assert "forgotten" not in fresh.evaluate("[...document.querySelectorAll('article')].at(-1).className")


def test_stop_frees_the_place(fresh: Page, server: Running) -> None:
    set_fields(fresh, TEXT | {"max_tokens": "200"})
    ask(fresh, PROMPT)
    wait_for(fresh, "writing")
    assert server.served.service.counts().running == 1
    fresh.press("Escape")
    wait_for(fresh, "stopped")
    until(lambda: not server.served.service.counts().running)
    assert turns(fresh)[1][1] != ""


def test_what_the_server_refuses_is_said_in_its_words(fresh: Page) -> None:
    set_fields(fresh, {"mode": "text"})
    ask(fresh, "word " * 1000)
    wait_for(fresh, "failed")
    assert "256" in fresh.text("article.assistant .note")


def test_the_picture_is_the_engines(fresh: Page, server: Running) -> None:
    set_fields(fresh, TEXT)
    ask(fresh, PROMPT)
    wait_for(fresh, "done")
    snapshot = server.get("/experts").json()
    names = {"s": "slot", "l": "coming", "g": "guess", "b": "berth", "f": "file"}
    expected = [
        names[letter] + (" miss" if e in last["miss"] else " hit" if e in last["hit"] else "")
        for row, last in zip(snapshot["places"], snapshot["last"], strict=True)
        for e, letter in enumerate(row)
    ]
    assert {"slot", "berth"} < set(expected) and sum(
        "hit" in name or "miss" in name for name in expected
    ) == 16
    fresh.wait(
        "JSON.stringify([...document.querySelectorAll('#picture i')].map((cell) => cell.className)) === "
        f"{json.dumps(json.dumps(expected, separators=(',', ':')))}"
    )
    fresh.wait("document.querySelector('#meters').innerText.includes('0 running, 0 waiting')")
    assert "hit ratio" in fresh.text("#meters") and "wasted" in fresh.text("#meters")


def test_a_key(browser: Chromium, offloaded: Engine) -> None:
    from runtime.serve.guard import Keys
    from tests.runtime.serve.served import running

    with running(offloaded, keys=Keys(["secret"])) as server:
        page = Page(browser, server.url + "/")
        page.wait("document.querySelector('#key').open")
        page.type("secret")
        page.press("Enter")
        page.wait("document.querySelectorAll('#picture i').length === 64")
        set_fields(page, TEXT | {"max_tokens": "3"})
        ask(page, PROMPT)
        wait_for(page, "done")
        assert page.complaints == []
        page.close()
