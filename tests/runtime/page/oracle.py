"""What a Markdown text should become, by markdown-it-py, and what the page makes of it, in the same form.

A tree is a list of a name and children; a text is a string. Code is `["pre", language, text]`, a link is
`["a", address, ...]`, a cell has its alignment first, an ordered list its first number. Names of headings are
the page's, which begin with h3. Paragraphs of tight lists are left out.
"""

import json
from html.parser import HTMLParser
from typing import Any

from dev.chromium_page import Page

Tree = list[Any]
MAKE = """
(async (texts) => {
  const { showMarkdown } = await import("./markdown.js");
  function tree(node) {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    const name = node.localName;
    if (node.className === "code") {
      return ["pre", node.querySelector(".bar span").textContent, node.querySelector("pre").textContent];
    }
    const children = [...node.childNodes].map(tree);
    if (node.className === "table") return children[0];
    if (name === "a") return [name, node.getAttribute("href"), ...children];
    if (name === "th" || name === "td") return [name, node.className, ...children];
    if (name === "ol") children.unshift(node.start);
    if (name === "li" && node.parentNode.className === "tight") {
      return [name, ...children.flatMap((child) => (child[0] === "p" ? child.slice(1) : [child]))];
    }
    return [name, ...children];
  }
  return texts.map((text) => {
    const target = document.createElement("div");
    showMarkdown(target, text);
    return [...target.childNodes].map(tree);
  });
})"""


def page_trees(page: Page, texts: list[str]) -> list[Tree]:
    """What the page makes of each text: the blocks' trees."""
    found: list[Tree] = page.evaluate(f"{MAKE}({json.dumps(texts)})")
    return [joined(tree) for tree in found]


def oracle_tree(text: str) -> Tree:
    """What markdown-it-py makes of a text: the blocks' trees."""
    from markdown_it import MarkdownIt  # which a machine that is to test a GPU need not have

    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    parser.disable(["lheading", "reference", "html_block", "html_inline", "entity"])
    reader = Reader()
    reader.feed(parser.render(text))
    reader.close()
    return joined(reader.stack[0])


class Reader(HTMLParser):
    """Makes a tree of the HTML that markdown-it-py writes."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[Tree] = [[]]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        node: Tree = [f"h{min(6, int(tag[1]) + 2)}" if tag[0] == "h" and tag[1:].isdigit() else tag]
        if tag == "a":
            node.append(given["href"])
        elif tag == "img":  # the page links to it instead, unless it is in a link
            if any(outer[:1] == ["a"] for outer in self.stack):
                return self.stack[-1].append(given["alt"])
            node[:] = ["a", given["src"], given["alt"]]
        elif tag == "s":
            node[0] = "del"
        elif tag in ("th", "td"):
            node.append(given.get("style", "").removeprefix("text-align:"))
        elif tag == "ol":
            node.append(int(given.get("start", 1)))
        elif tag == "code" and self.stack[-1][0:1] == ["pre"]:
            self.stack[-1].append(given.get("class", "").removeprefix("language-"))
            return
        self.stack[-1].append(node)
        if tag not in ("br", "hr", "img"):
            self.stack.append(node)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag: str) -> None:
        if tag != "code" or self.stack[-1][0] != "pre":
            node = self.stack.pop()
            if tag == "pre":
                node[2:] = ["".join(node[2:]).removesuffix("\n")]

    def handle_data(self, data: str) -> None:
        inside = self.stack[-1][0] if self.stack[-1] else ""
        if inside == "pre" or data.strip("\n") or data == " ":
            self.stack[-1].append(data if inside == "pre" else data.replace("\n", ""))


def joined(tree: Tree, is_root: bool = True) -> Tree:
    """A tree in which texts that meet are one, and none is empty. Names and addresses are no texts."""
    fixed = 0 if is_root else 2 if tree[0] in ("a", "th", "td", "ol", "pre") else 1
    made = list(tree[:fixed])
    for child in tree[fixed:]:
        if isinstance(child, list):
            made.append(joined(child, False))
        elif child != "" and len(made) > fixed and isinstance(made[-1], str):
            made[-1] += child
        elif child != "" or tree[0:1] == ["pre"]:
            made.append(child)
    return made
