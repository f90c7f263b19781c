"""Random Markdown: well-formed documents, soup, and texts that mean harm."""

from random import Random

WORDS = (
    "expert",
    "slots",
    "a",
    "router",
    "naïve",
    "x_1",
    "2024.",
    "e.g.",
    "“quoted”",
    "(in brackets)",
    "5 * 3",
    "λ",
)
KINDS = ("word", "word", "em", "strong", "code", "link", "del", "escaped")
INLINE = (
    *(
        "a",
        "b ",
        "c",
        " ",
        "*",
        "**",
        "***",
        "_",
        "__",
        "`",
        "``",
        "~~",
        "[x](mailto:a@b)",
        "![y](mailto:c@d)",
        "](mailto:e@f)",
    ),
    *("[", "]", "(", ")", "\\*", "\\", "\n", "!", "<b>", ".", "é", "“"),
)
BLOCKS = ("1. ", "- ", "> ", "# ", "\n\n", "    ", "  ", "```\n", "|", "---\n", "|-|-|\n", ").")
HARM = (
    "<script>hit()</script>",
    "<img src=x onerror=hit()>",
    "<svg onload=hit()>",
    "<iframe srcdoc='<script>hit()</script>'>",
    "<style>*{display:none}</style>",
    "</div>",
    "[x](javascript:hit())",
    "[x](JaVaScRiPt:hit())",
    "[x](<java\tscript:hit()>)",
    "[x](data:text/html,<script>hit()</script>)",
    "[x](/v1/models)",
    "[x](//evil.example/)",
    '[x](https://ok.example/"onclick=hit())',
    "![x](https://evil.example/a.png)",
    "<javascript:hit()>",
    *("&lt;b&gt;", "{{x}}", "${hit()}", "\x00", "\u202e"),
    *("| a |\n|-|\n|", "```html\n", "`", "\n", "**", "[", "](", "- ", "> "),
)


def phrase(draw: Random, inside: tuple[str, ...] = ()) -> str:
    """Well-formed text of one line, in which nothing is inside its like."""
    parts = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.choice([kind for kind in KINDS if kind not in inside])
        inner = phrase(draw, (*inside, kind)) if kind in ("em", "strong", "del") else ""
        made = {
            "word": draw.choice(WORDS),
            "em": f"_{inner}_",
            "strong": f"**{inner}**",
            "code": draw.choice(("`a*b*`", "`` ` ``", "`<b>`")),
            "link": f"[{draw.choice(WORDS)}](mailto:a@b" + draw.choice((")", " 'title')")),
            "del": f"~~{inner}~~",
            "escaped": draw.choice(("\\*no\\*", "\\`", "\\[x]", "a\\_b", "<i>&amp</i>")),
        }
        parts.append(made[kind])
    return " ".join(parts)


def document(draw: Random, depth: int = 0) -> list[str]:
    """Lines of well-formed blocks, with a blank line after each. At depth 3 there are no blocks in blocks."""
    lines = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.choice(("paragraph", "heading", "code", "rule", "table", "list", "steps", "quote"))
        if kind == "paragraph":
            lines += [phrase(draw) for _ in range(draw.randint(1, 3))]
        elif kind == "heading":
            lines += [f"{'#' * draw.randint(1, 6)} {phrase(draw)}"]
        elif kind == "code":
            fence = draw.choice(("```", "~~~~"))
            lines += [f"{fence}python", "def f(*args):", "", "    return '*'  # <b>", fence]
        elif kind == "rule":
            lines += [draw.choice(("***", "- - -", "___"))]
        elif kind == "table":
            lines += [f"| {phrase(draw)} | b |", "|:-:|--:|", f"| {phrase(draw)} | a \\| b |", "| c | |"]
        elif depth < 3:
            inner = document(draw, depth + 1)
            lines += quote(inner) if kind == "quote" else items(draw, kind == "list", inner)
        lines += ["" if lines and lines[-1] else phrase(draw), ""]
    return lines


def quote(inner: list[str]) -> list[str]:
    return [f"> {line}" for line in inner[:-1]]


def items(draw: Random, bullets: bool, inner: list[str]) -> list[str]:
    """A list of one to three items, in some of which are blocks."""
    lines = []
    for number in range(1, draw.randint(2, 4)):
        mark = "- " if bullets else f"{number}. "
        lines += [mark + phrase(draw), *draw.choice(([], [""]))]
        lines += [" " * len(mark) + line if line else "" for line in draw.choice((inner, []))]
    return lines


def soup(draw: Random, pieces: tuple[str, ...], most: int = 14) -> str:
    return "".join(draw.choices(pieces, k=draw.randint(1, most))).strip("\n ")
