"""Keep what users write apart from what a chat template writes.

A template mixes both into one text, and the tokenizer looks for control tokens in that text. A user who
writes `<|im_end|>` must not get one. So the guard changes the messages before the template sees them. It
replaces the punctuation of all control tokens by stand-ins, which are characters that occur nowhere else.
Every control token in the rendered text is then the template's own, and the guard turns the stand-ins back
into punctuation.

A stand-in replaces one character, and is neither white space nor a letter. So a template may strip, cut,
join, compare and replace, with the same result as without the guard. A template that looks for such
punctuation in a message does not find it. `render_guarded` says what follows from that.

Tools and calls of them hold texts too, in JSON values, and each of these texts is hidden. The brackets and
numbers around them are JSON's own. A conversation in which these spell a control token is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from tokenizer.added_tokens import Splitter
from tokenizer.errors import TokenizerError, quoted

PRIVATE = range(0xF0000, 0xF2000)  # code points that Unicode leaves to private use

Given = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # messages and tools, as a template sees them


class Guard:
    """Stand-ins for the punctuation of `tokens`, none of which occurs in `texts`.

    >>> guard = Guard(["<|end|>"], ["say <|end|> to end"])
    >>> hidden = guard.hide("say <|end|> to end")
    >>> "<" in hidden, "|" in hidden, len(hidden), guard.show(hidden.strip("d "))
    (False, False, 18, 'say <|end|> to en')
    """

    def __init__(self, tokens: Iterable[str], texts: Iterable[str]) -> None:
        keys = sorted({character for token in tokens for character in key_characters(token)})
        taken = set().union(*texts)
        free = [code for code in PRIVATE if chr(code) not in taken][: len(keys)]
        if len(free) < len(keys):
            raise TokenizerError(
                f"the conversation holds {len(PRIVATE)} private-use characters (from U+F0000 on); remove them"
            )
        self._hide = {ord(key): code for key, code in zip(keys, free, strict=True)}
        self._show = {code: key for key, code in self._hide.items()}

    def hide(self, text: str) -> str:
        return text.translate(self._hide)

    def show(self, text: str) -> str:
        return text.translate(self._show)


def key_characters(token: str) -> set[str]:
    """Return the characters of a token that no user may supply: its punctuation, or all if it has none."""
    marks = {c for c in token if not c.isalnum() and not c.isspace()}
    return marks or {c for c in token if not c.isspace()}


def render_guarded(
    render: Callable[[Given], str],
    give: Callable[[Callable[[str], str]], Given],
    control: Splitter,
    taken: Iterable[str],
) -> list[str | int]:
    """Return the conversation that `render` writes: texts, and ids of the control tokens in the template.

    `give(change)` makes what `render` takes, with every text that is not ours changed. `taken` are further
    texts from which `render` may take characters, such as the template itself.

    A template may look into messages, as in `'</think>' in message.content`, and write something else because
    the punctuation is hidden. So this function also renders the messages unchanged. It prefers that rendering
    if no message spells a control token, in letters of any case, and if both renderings have the same control
    tokens in the same order. Then no user had a part in them.
    """
    texts: list[str] = []
    given = give(lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    guard = Guard(control.tokens, [*texts, *taken])
    hidden = give(guard.hide)
    check_structures(hidden, control)
    if hidden == given:
        return list(control.split(render(given)))
    parts = list(control.split(render(hidden)))
    shown = [guard.show(part) if isinstance(part, str) else part for part in parts]
    folded = [text.casefold() for text in texts]
    if not any(token.casefold() in text for token in control.tokens for text in folded):
        plain = list(control.split(render(given)))
        if ids_of(plain) == ids_of(parts):
            return plain
    return shown


def check_structures(hidden: Given, control: Splitter) -> None:
    """Raise `TokenizerError` if JSON values spell a control token, "[]" for one, though texts are hidden."""
    messages, tools = hidden
    for value in [*tools, *(m["tool_calls"] for m in messages if "tool_calls" in m)]:
        for separators in ((", ", ": "), (",", ":")):
            if found := control.found(json.dumps(value, ensure_ascii=False, separators=separators)):
                raise TokenizerError(
                    f"the JSON of tools or calls spells the control token {quoted(found[0])}; "
                    "use tools and arguments without it"
                )


def ids_of(parts: Iterable[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]
