"""Server-sent events come out the same, however the network cuts them."""

import json
from random import Random

import pytest

from dev.chromium_page import Page

pytestmark = pytest.mark.browser

TEXTS = ("", "{}", '{"a": "é𝄞"}', "[DONE]", " two spaces", "data: x", ":")
READ = """(async (cases) => {
  const { EventParser } = await import("./sse.js");
  return cases.map((pieces) => {
    const parser = new EventParser();
    return pieces.flatMap((piece) => parser.push(piece));
  });
})"""


def written(draw: Random, data: str) -> str:
    """An event as some server might write it: line ends, comments and other fields as they come."""
    end = draw.choice(("\n", "\r\n", "\r"))
    lines = [draw.choice((": comment", "event: message", "id: 5", "retry: 10"))]
    for line in data.split("\n"):
        space = " " if line.startswith(" ") else draw.choice(("", " "))  # of which one is no part of the data
        lines.append(f"data:{space}{line}")
    return "".join(line + end for line in [*lines, ""])


def test_events_are_read_however_they_are_cut(modules: Page) -> None:
    draw = Random(6)
    cases, expected = [], []
    for _ in range(150):
        events = ["\n".join(draw.choices(TEXTS, k=draw.randint(1, 3))) for _ in range(draw.randint(0, 4))]
        text = "".join(written(draw, data) for data in events) + draw.choice(("", "data: not ended"))
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, len(text))))
        cases.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
        expected.append(events)
    assert modules.evaluate(f"{READ}({json.dumps(cases)})") == expected
