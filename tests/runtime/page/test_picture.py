"""The experts' picture, and what the page looks like on screens of all sizes."""

import time

import pytest

from dev.chromium_page import Page
from tests.runtime.page.doing import ask, wait_for
from tests.runtime.page.stub import SNAPSHOT, Stub

pytestmark = pytest.mark.browser

NARROW, WIDE = (390, 844), (1280, 800)


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
    assert page.text("#cell") == "Layer 0, expert 0: in a slot; hit in the last step"
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp"):
        page.press(key)
    assert page.text("#cell") == "Layer 0, expert 2: on its way; missed in the last step"
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
    for inside in ("#experts", "#picture", "#composer", "header"):
        assert page.evaluate(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector({inside!r}))")
    cell = page.evaluate(
        "(({width, height}) => [width, height])(document.querySelector('#picture i').getBoundingClientRect())"
    )
    assert min(cell) >= 3.0
    assert page.evaluate("document.querySelector('#log').clientHeight") >= 120
    ends = "((e) => e.scrollTop + e.clientHeight >= e.scrollHeight - 2)(document.querySelector('#log'))"
    page.wait(ends)  # it follows what is written
    for height in (size[1] - 80, size[1]):  # and stays there if its own size changes
        page.resize(size[0], height)
        page.wait(ends)


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
