"""The page in a browser, with a server that does as it is told."""

import json
from typing import Any

import pytest

from dev.chromium_page import Page
from dev.page_figure import set_fields
from tests.leftovers import PATIENCE
from tests.runtime.page.doing import ask, turns, wait_for
from tests.runtime.page.stub import Refusal, Stub

pytestmark = pytest.mark.browser


def test_a_conversation(page: Page, stub: Stub) -> None:
    stub.answer = lambda body: ["I am ", "number ", str(len(body["messages"]))]
    ask(page, "Who?")
    wait_for(page, "done")
    ask(page, "And now?")
    page.wait("document.querySelectorAll('article').length === 4")
    wait_for(page, "done")
    expected = [["user", "Who?"], ["assistant", "I am number 1"], ["user", "And now?"]]
    assert turns(page) == [*expected, ["assistant", "I am number 3"]]
    path, body = stub.requests[-1]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "demo",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": role, "content": text} for role, text in expected],
    }
    figures = page.text("article:last-child .figures")
    assert figures.startswith("3 tokens · first after ") and figures.endswith("· prompt 7, 3 of them reused")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert "Answer done" in page.evaluate("document.querySelector('#status').textContent")


def test_shift_enter_begins_a_line_and_nothing_is_not_sent(page: Page, stub: Stub) -> None:
    page.press("Enter")
    ask(page, "   ")
    page.type("字")
    page.evaluate(  # the Enter that ends an input method's composition
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
        "{ key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))"
    )
    page.press("Shift+Enter")
    assert stub.requests == [] and turns(page) == []
    page.evaluate("document.querySelector('#prompt').value = ''")
    page.type("one")
    page.press("Shift+Enter")
    page.type("two")
    page.press("Enter")
    wait_for(page, "done")
    assert stub.requests[0][1]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_frees_the_server_and_keeps_what_came(page: Page, stub: Stub, how: str) -> None:
    stub.answer = lambda body: ["kept", *[0.02, ""] * 500]
    ask(page, "Go on for ever")
    wait_for(page, "writing")
    assert page.evaluate("document.querySelector('#send').hidden")
    if how == "button":
        page.click("#stop")
    else:
        page.press("Escape")
    wait_for(page, "stopped")
    assert stub.gone.wait(PATIENCE)
    assert turns(page)[1] == ["assistant", "kept"] and page.text("article.assistant .note") == "stopped"
    stub.answer = lambda body: [json.dumps(body["messages"])]
    ask(page, "What did you say?")
    wait_for(page, "done")
    assert [m["content"] for m in stub.requests[-1][1]["messages"]][1] == "kept"


def test_retry_asks_the_same_again(page: Page, stub: Stub) -> None:
    answers = iter(["first", "second", "third"])
    stub.answer = lambda body: [next(answers)]
    ask(page, "Once more")
    wait_for(page, "done")
    page.click("article.assistant .actions button:last-child")
    page.wait("document.querySelector('article.assistant .text').innerText === 'second'")
    wait_for(page, "done")
    page.press("Alt+r")
    page.wait("document.querySelector('article.assistant .text').innerText === 'third'")
    assert stub.requests[0] == stub.requests[1] == stub.requests[2]
    assert turns(page) == [["user", "Once more"], ["assistant", "third"]]


def test_an_edited_message_replaces_what_followed(page: Page, stub: Stub) -> None:
    for text in ("one", "two"):
        ask(page, text)
        wait_for(page, "done")
    page.wait("document.querySelectorAll('article').length === 4")
    page.press("ArrowUp")  # in the empty field: the last message
    assert page.evaluate("document.querySelector('#prompt').value") == "two"
    page.press("Escape")
    assert page.evaluate("document.querySelector('#editing').hidden") and len(turns(page)) == 4
    page.evaluate("document.querySelector('article.user .actions button:last-child').click()")
    page.evaluate("document.querySelector('#prompt').select()")
    ask(page, "three")
    page.wait("document.querySelectorAll('article').length === 2")
    wait_for(page, "done")
    assert stub.requests[-1][1]["messages"] == [{"role": "user", "content": "three"}]


def test_a_new_conversation_forgets_the_old_one(page: Page, stub: Stub) -> None:
    stub.answer = lambda body: ["x", *[0.02, "y"] * 500]
    ask(page, "Forget me")
    wait_for(page, "writing")
    page.press("Alt+n")
    assert stub.gone.wait(PATIENCE) and turns(page) == []
    stub.answer = lambda body: ["new"]
    ask(page, "Hello")
    wait_for(page, "done")
    assert turns(page) == [["user", "Hello"], ["assistant", "new"]]
    assert len(stub.requests[-1][1]["messages"]) == 1


def test_settings_are_sent_and_kept(page: Page, stub: Stub) -> None:
    page.press("Alt+s")
    fields = {"temperature": "0.3", "top_p": "0.5", "max_tokens": "9", "seed": "4", "system": "Be brief."}
    set_fields(page, fields)
    set_fields(page, {"temperature": "7"})  # is refused
    page.evaluate("document.querySelector('#settings').close()")
    for again in (False, True):
        if again:
            page.go(stub.url)
        ask(page, "Hi")
        wait_for(page, "done")
        body = stub.requests[-1][1]
        assert {k: body[k] for k in ("temperature", "top_p", "max_completion_tokens", "seed")} == {
            "temperature": 0.3, "top_p": 0.5, "max_completion_tokens": 9, "seed": 4,
        }  # fmt: skip
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#open-settings")
    page.click("#default-settings")
    page.click("#settings button[type=submit]")
    assert not page.evaluate("document.querySelector('#settings').open")
    page.press("Alt+r")
    page.wait("document.querySelector('article.assistant')")
    wait_for(page, "done")
    assert set(stub.requests[-1][1]) == {"messages", "model", "stream", "stream_options"}


def test_a_text_is_continued_as_it_is(page: Page, stub: Stub) -> None:
    stub.answer = lambda body: ["    return *a*, **b**\n", "\n# end"]
    page.press("Alt+s")
    set_fields(page, {"mode": "text", "max_tokens": "5"})
    page.click("#settings button[type=submit]")
    ask(page, "def f():")
    wait_for(page, "done")
    path, body = stub.requests[-1]
    assert (path, body["prompt"], body["max_tokens"]) == ("/v1/completions", "def f():", 5)
    assert page.evaluate("document.querySelector('article.assistant .plain').textContent") == (
        "    return *a*, **b**\n\n# end"
    )


@pytest.mark.parametrize(
    ("refusal", "note"),
    [
        (Refusal(429, "the queue is full", {"Retry-After": "3"}), "the queue is full. Try again in 3 s."),
        (Refusal(400, "temperature: has to be at most 2"), "temperature: has to be at most 2"),
        ([None], "the connection broke off before the answer's end"),
        (["half", {"error": {"message": "a file has changed"}}], "a file has changed"),
        (["half", ("finish", "length")], "stopped at the limit of tokens"),
        ([], "the model wrote nothing"),
    ],
)
def test_what_went_wrong_is_said(page: Page, stub: Stub, refusal: Any, note: str) -> None:
    stub.answer = lambda body: refusal
    ask(page, "Try")
    page.wait("document.querySelector('article.assistant .note')?.innerText")
    assert page.text("article.assistant .note") == note
    text = turns(page)[1][1]
    stub.answer = lambda body: ["well"]
    ask(page, "Again")
    page.wait("document.querySelectorAll('article').length === 4")
    wait_for(page, "done")
    sent = [m["content"] for m in stub.requests[-1][1]["messages"]]
    assert sent == (["Try", text, "Again"] if text else ["Again"])  # roles have to alternate


def test_a_full_context_forgets_the_older_half(page: Page, stub: Stub) -> None:
    """As the shell does, instead of refusing for ever. A single question that is too long is refused."""
    full = Refusal(400, "the prompt is too long", code="context_length_exceeded")
    stub.answer = lambda body: full if sum(len(m["content"]) for m in body["messages"]) > 20 else ["ok"]
    for text in ("q1", "q2", "q3", "q4"):  # 16 characters with their answers
        ask(page, text)
        page.wait(f"[...document.querySelectorAll('article')].at(-2).innerText.includes({text!r})")
        wait_for(page, "done")
    ask(page, "question 5")
    page.wait("document.querySelectorAll('article').length === 10")
    wait_for(page, "done")
    assert [m["content"] for m in stub.requests[-1][1]["messages"]] == ["q3", "ok", "q4", "ok", "question 5"]
    gone = page.evaluate(
        "[...document.querySelectorAll('.forgotten')].map((each) => each.innerText.split('\\n')[0])"
    )
    assert gone == ["q1", "ok", "q2", "ok"]
    assert page.text(".forgotten .note") == "the context is full: no longer sent"
    ask(page, "far too long a question for this")
    wait_for(page, "failed")
    assert page.text("article.assistant .note") == "the prompt is too long"
    assert len(stub.requests) == 4 + 2 + 3  # five, then two, then one question


def test_a_key_is_asked_for_and_kept_in_memory_only(page: Page, stub: Stub) -> None:
    stub.key = "secret"
    page.go(stub.url)
    for key in ("wrong", "secret"):
        page.wait("document.querySelector('#key').open && document.activeElement.id === 'key-value'")
        page.type(key)
        page.press("Enter")
        if key == "wrong":
            page.wait("document.querySelector('#key-why').innerText.includes('refused')")
    page.wait("document.querySelector('#model').textContent === 'demo'")
    page.wait("document.querySelectorAll('#picture i').length === 12")
    ask(page, "Hi")
    wait_for(page, "done")
    kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
    assert "secret" not in page.evaluate(kept + " + document.documentElement.outerHTML")
    assert page.evaluate("document.querySelector('#key-value').value") == ""
