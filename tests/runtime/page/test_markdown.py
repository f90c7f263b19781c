"""Markdown on the page: against markdown-it-py, while it grows, and where it means harm."""

import json
import time
from random import Random

import pytest

from dev.chromium_page import Page
from tests.runtime.page.documents import BLOCKS, HARM, INLINE, document, soup
from tests.runtime.page.oracle import oracle_tree, page_trees

pytestmark = pytest.mark.browser


def test_documents(modules: Page) -> None:
    """What is well formed becomes what CommonMark says, to the letter."""
    draw = Random(1)
    texts = ["\n".join(document(draw)).strip("\n") for _ in range(150)]
    wrong = [
        (text, found, expected)
        for text, found in zip(texts, page_trees(modules, texts), strict=True)
        if found != (expected := oracle_tree(text))
    ]
    assert wrong[:1] == []


@pytest.mark.parametrize(("pieces", "few"), [(INLINE, 3), (INLINE + BLOCKS, 10)])
def test_soup(modules: Page, pieces: tuple[str, ...], few: int) -> None:
    """What is not well formed, too, but for very few of a thousand."""
    draw = Random(2)
    texts = [soup(draw, pieces) for _ in range(1000)]
    trees = page_trees(modules, texts)
    assert sum(tree != oracle_tree(text) for text, tree in zip(texts, trees, strict=True)) <= few


def test_what_models_write_though_commonmark_reads_it_otherwise(modules: Page) -> None:
    texts = {
        "1. a\n  - b\n2. c": [["ol", 1, ["li", "a", ["ul", ["li", "b"]]], ["li", "c"]]],
        "see https://x.org/_(b)_).": [["p", "see ", ["a", *["https://x.org/_(b)"] * 2], "_)."]],
        "<https://x.org/>!": [["p", ["a", "https://x.org/", "https://x.org/"], "!"]],
        "In\n2023. Yes": [["p", "In", ["br"], "2023. Yes"]],
        "```c\nint a;": [["pre", "c", "int a;"]],  # the fence has not come yet
    }
    assert page_trees(modules, list(texts)) == list(texts.values())


GROW = """(async (text) => {
  const { showMarkdown } = await import("./markdown.js");
  const growing = document.createElement("div");
  for (let end = 0; end <= text.length; end++) {
    const [whole, before] = [document.createElement("div"), [...growing.children]];
    showMarkdown(growing, text.slice(0, end));
    showMarkdown(whole, text.slice(0, end));
    if (growing.innerHTML !== whole.innerHTML) return `not the same: ${text.slice(0, end)}`;
    const kept = before.filter((each) => each.parentNode === growing).length;
    if (kept < before.length - 2) return `${kept} of ${before.length} kept: ${text.slice(0, end)}`;
  }
  showMarkdown(growing, "");
  return growing.innerHTML;
})"""


def test_a_text_that_grows_shows_what_it_would_at_once(modules: Page) -> None:
    """And what does not change stays the same element, with what a reader has selected in it."""
    draw = Random(3)
    for _ in range(5):
        text = "\n".join(document(draw, 2))[:800]
        assert modules.evaluate(f"{GROW}({json.dumps(text)})") == ""


SHOW = """(async (texts) => {
  const { showMarkdown } = await import("./markdown.js");
  window.hits = 0;
  window.hit = () => hits++;
  const [tags, attributes, addresses] = [new Set(), new Set(), new Set()];
  for (const text of texts) {
    const target = document.querySelector("#log").appendChild(document.createElement("div"));
    showMarkdown(target, text);
    for (const each of target.querySelectorAll("*")) {
      tags.add(each.localName);
      each.getAttributeNames().forEach((name) => attributes.add(name));
      if (each.localName === "a") addresses.add(each.origin === location.origin ? "ours" : each.protocol);
    }
    target.remove();
  }
  await new Promise((resolve) => setTimeout(resolve, 50));
  return [[...tags], [...attributes], [...addresses], hits];
})"""
ATTRIBUTES = {"class", "start", "tabindex", "title", "type", "href", "target", "rel"}
TAGS = {
    *(
        "p",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "blockquote",
        "ul",
        "ol",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    ),
    *("div", "span", "pre", "code", "button", "em", "strong", "del", "a", "br"),
}


def test_no_text_becomes_markup(modules: Page) -> None:
    draw = Random(4)
    texts = [*HARM, *(soup(draw, HARM, 12) for _ in range(400))]
    tags, attributes, addresses, hits = modules.evaluate(f"{SHOW}({json.dumps(texts)})")
    assert set(tags) <= TAGS and set(attributes) <= ATTRIBUTES and hits == 0
    assert addresses == ["https:"]


def test_markup_made_of_text_is_forbidden_to_the_page_itself(modules: Page) -> None:
    """The policy would stop even a mistake."""
    assert "TrustedHTML" in modules.evaluate(
        "(() => { try { document.body.innerHTML = '<b>'; return 'no' } catch (e) { return e.message } })()"
    )
    assert modules.complaints and all("TrustedHTML" in each for each in modules.complaints)
    modules.complaints.clear()


PIECES = (
    *(
        "*",
        "**a",
        "_a*",
        "[",
        "[](",
        "![a](",
        "`",
        "`a``",
        "> ",
        "- ",
        "1. ",
        "|",
        "~~a",
        "\\",
        "<https://",
        " ",
    ),
    *(
        "#",
        "a|\n-|\n",
        "```\n",
        "- a\n  ",
        "*a_ ",
        "http://",
        "--",
        "\n>",
        "a\n",
        "a\n\n",
        "~",
        "a|b\n",
        "|-",
    ),
)


def test_long_texts_take_no_longer_than_others(modules: Page) -> None:
    """Forty thousand characters of what makes careless parsers go back and forth."""
    seconds = {}
    for piece in PIECES:
        text = (piece * 40_000)[:40_000]
        began = time.monotonic()
        modules.evaluate(f"{SHOW}([{json.dumps(text)}])")
        seconds[piece] = time.monotonic() - began
    assert {piece: s for piece, s in seconds.items() if s > 10} == {}


def test_colored_code_is_the_same_code(modules: Page) -> None:
    draw = Random(5)
    pieces = (*"'\"`\\#\n $é", '"""', "//", "/*", "*/", "--", "def", "12.5e3", "x", "if")
    texts = [soup(draw, pieces, 20) for _ in range(200)]
    wrong = modules.evaluate(
        """(async (texts) => {
          const { highlighted } = await import("./code.js");
          const words = (nodes) => nodes.map((node) => node.textContent ?? node).join("");
          const names = ["python", "js", "sql", "php", "unknown"];
          return texts.filter((text) => names.some((name) => words(highlighted(text, name)) !== text));
        })"""
        + f"({json.dumps(texts)})"
    )
    assert wrong == []
    kinds = modules.evaluate(
        """(async () => {
          const { highlighted } = await import("./code.js");
          const nodes = highlighted('def f(): return "a" # 1', "python");
          return nodes.map((node) => [node.className ?? "", node.textContent ?? node]);
        })()"""
    )
    words = [
        ("keyword", "def"),
        ("", " f(): "),
        ("keyword", "return"),
        ("", " "),
        ("string", '"a"'),
        ("", " "),
    ]
    assert kinds == [list(word) for word in [*words, ("comment", "# 1")]]
