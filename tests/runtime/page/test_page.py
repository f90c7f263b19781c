"""The page in a browser, with a server that does as it is told."""

import json
import time
from typing import Any

import pytest

from dev.chromium_page import Page
from tests.runtime.page.stub import SNAPSHOT, Refusal, Stub

pytestmark = pytest.mark.browser

NARROW, WIDE = (390, 844), (1280, 800)


def ask(page: Page, text: str) -> None:
    page.evaluate("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")


def wait_for(page: Page, state: str) -> None:
    page.wait(f"[...document.querySelectorAll('article.assistant')].at(-1)?.dataset.state === {state!r}")


def turns(page: Page) -> list[list[str]]:
    """Role and text of each turn that is seen."""
    found: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('article')].map((each) => "
        "[each.classList[0], each.querySelector('.text').innerText])"
    )
    return found


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
    assert stub.gone.wait(5)
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
    assert stub.gone.wait(5) and turns(page) == []
    stub.answer = lambda body: ["new"]
    ask(page, "Hello")
    wait_for(page, "done")
    assert turns(page) == [["user", "Hello"], ["assistant", "new"]]
    assert len(stub.requests[-1][1]["messages"]) == 1


def set_field(page: Page, name: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const field = document.querySelector('#settings form').elements[{name!r}];"
        f"field.value = {value!r}; field.dispatchEvent(new Event('input', {{bubbles: true}})) }})()"
    )


def test_settings_are_sent_and_kept(page: Page, stub: Stub) -> None:
    page.press("Alt+s")
    fields = {"temperature": "0.3", "top_p": "0.5", "max_tokens": "9", "seed": "4", "system": "Be brief."}
    for name, value in fields.items():
        set_field(page, name, value)
    set_field(page, "temperature", "7")  # is refused
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
    set_field(page, "mode", "text")
    set_field(page, "max_tokens", "5")
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


def test_the_picture_shows_where_each_expert_is(page: Page, stub: Stub) -> None:
    names = {"s": "slot", "l": "coming", "g": "guess", "b": "berth", "f": "file"}
    cells = "[...document.querySelectorAll('#picture i')].map((cell) => cell.className)"
    stub.snapshot["places"] = ["ffff", "ffff", "ffff"]
    page.wait(f"{cells}.every((name) => name.startsWith('file'))")
    stub.snapshot["places"] = SNAPSHOT["places"]
    page.wait(f"{cells}.includes('slot')")
    uses = {(0, 0): " hit", (0, 2): " miss", (1, 0): " hit"}
    expected = [
        names[letter] + uses.get((layer, expert), "")
        for layer, row in enumerate(SNAPSHOT["places"])
        for expert, letter in enumerate(row)
    ]
    assert page.evaluate(cells) == expected
    assert page.evaluate("document.querySelector('#picture').getAttribute('aria-label')") == (
        "3 layers of 4 experts: 5 in a slot, 1 on its way, 1 guessed, 3 in host memory, 2 in its file"
    )
    assert " ".join(page.text("#meters").split()) == (
        "tokens/s 13 hit ratio 0.75 link 3.0 GiB/s waited for it 25 % requests 1 running, 2 waiting "
        "copied 5.0 MiB, 1.0 MiB wasted"
    )


def test_the_picture_by_keyboard_and_mouse(page: Page) -> None:
    page.wait("document.querySelectorAll('#picture i').length === 12")
    page.evaluate("document.querySelector('#picture').focus()")
    assert page.text("#cell") == "Layer 0, expert 0: in a slot; hit by the last token"
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp"):
        page.press(key)
    assert page.text("#cell") == "Layer 0, expert 2: on its way; missed by the last token"
    for _ in range(9):
        page.press("ArrowRight")
    assert page.text("#cell") == "Layer 0, expert 3: in host memory"
    page.resize(*NARROW)  # layers now go from left to right
    page.press("ArrowRight")
    assert page.text("#cell") == "Layer 1, expert 3: in its file"
    page.resize(*WIDE)
    page.click("#picture i")
    assert page.text("#cell").startswith("Layer 2, expert 3: ")


def test_a_picture_that_ends_or_is_none(page: Page, stub: Stub) -> None:
    note = "document.querySelector('#experts-note').innerText"
    stub.snapshot["resident"] = True
    page.wait(f"{note} === 'All experts are on the device.'")
    assert "copied" not in page.text("#meters") and "tokens/s" in page.text("#meters")
    stub.snapshot["places"] = ["<b>", 5]
    page.wait(f"{note}.startsWith('No picture')")
    stub.closing = True
    page.wait(f"{note}.startsWith('The server has ended')")
    stub.closing = False
    stub.snapshot = SNAPSHOT | {"layers": 2, "places": ["ss", "bb"], "experts": 2, "last": []}
    page.wait("document.querySelectorAll('#picture i').length === 4")
    assert page.evaluate(note) == ""


@pytest.mark.parametrize("size", [NARROW, (320, 560), WIDE])
@pytest.mark.parametrize(("layers", "experts"), [(8, 8), (56, 8)])
def test_nothing_sticks_out(page: Page, stub: Stub, size: tuple[int, int], layers: int, experts: int) -> None:
    page.resize(*size)
    stub.answer = lambda body: [
        "```\n" + "long " * 99 + "\n```\n",
        "w" * 999,
        "\n\n|" + "a|" * 60 + "\n|" + "-|" * 60,
    ]
    stub.snapshot = SNAPSHOT | {"layers": layers, "experts": experts, "places": ["s" * experts] * layers}
    page.evaluate(
        "document.querySelector('#experts').hidden && document.querySelector('#toggle-experts').click()"
    )
    ask(page, "word" * 100)
    wait_for(page, "done")
    page.wait(f"document.querySelectorAll('#picture i').length === {layers * experts}")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate(
        "document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth"
    )
    assert page.evaluate("document.querySelector('#prompt').getBoundingClientRect().bottom") <= size[1]
    cell = page.evaluate(
        "(({width, height}) => [width, height])(document.querySelector('#picture i').getBoundingClientRect())"
    )
    assert min(cell) >= 3.0
    assert page.evaluate("document.querySelector('#log').clientHeight") >= 120
    box = "document.querySelector('#log')"
    assert page.evaluate(f"{box}.scrollTop + {box}.clientHeight >= {box}.scrollHeight - 2")  # it follows


def test_colors_follow_the_system_and_the_button(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.prefer("light")
    light = page.evaluate(ground)
    page.prefer("dark")
    dark = page.evaluate(ground)
    assert light != dark
    page.click("#theme")
    assert (page.text("#theme"), page.evaluate(ground)) == ("Light", light)
    page.prefer("light")
    page.click("#theme")
    assert (page.text("#theme"), page.evaluate(ground)) == ("Dark", dark)


def test_the_log_stays_where_the_reader_is(page: Page, stub: Stub) -> None:
    stub.answer = lambda body: [
        *[f"line {i}\n" for i in range(100)],
        0.3,
        *[f"more {i}\n" for i in range(50)],
    ]
    ask(page, "Write")
    page.wait("document.querySelector('#log').scrollTop > 500")
    page.evaluate("document.querySelector('#log').scrollTop = 100")
    time.sleep(0.05)
    wait_for(page, "done")
    assert page.evaluate("document.querySelector('#log').scrollTop") == 100
