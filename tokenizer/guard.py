"""Keep what users write apart from what a chat template writes.

A template mixes both into one text, and the tokenizer looks for control tokens in that text. A user who
writes `<|im_end|>` must not get one. So the guard changes the messages before the template sees them. It
replaces the punctuation of all control tokens by stand-ins, which are characters that occur nowhere else.
Every control token in the rendered text is then the template's own, and the guard turns the stand-ins back
into punctuation.

A stand-in replaces one character, and is neither white space nor a letter. So a template may strip, cut,
join, compare and replace, with the same result as without the guard. A template that looks for such
punctuation in a message does not find it. `render_guarded` says what follows from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tokenizer.added_tokens import Splitter
from tokenizer.errors import TokenizerError

PRIVATE = range(0xF0000, 0xF2000)  # code points that Unicode leaves to private use

Messages = Sequence[Mapping[str, str]]


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
    render: Callable[[Messages], str], messages: Messages, control: Splitter, taken: Iterable[str]
) -> list[str | int]:
    """Return the conversation that `render` writes: texts, and ids of the control tokens in the template.

    `taken` are further texts from which `render` may take characters, such as the template itself.

    A template may look into messages, as in `'</think>' in message.content`, and write something else because
    the punctuation is hidden. So this function also renders the messages unchanged. It prefers that rendering
    if no message spells a control token, in letters of any case, and if both renderings have the same control
    tokens in the same order. Then no user had a part in them.
    """
    contents = [message["content"] for message in messages]
    guard = Guard(control.tokens, [*contents, *taken])
    hidden = [{**message, "content": guard.hide(message["content"])} for message in messages]
    if hidden == list(messages):
        return list(control.split(render(messages)))
    parts = list(control.split(render(hidden)))
    shown = [guard.show(part) if isinstance(part, str) else part for part in parts]
    folded = [content.casefold() for content in contents]
    if not any(token.casefold() in content for token in control.tokens for content in folded):
        plain = list(control.split(render(messages)))
        if ids_of(plain) == ids_of(parts):
            return plain
    return shown


def ids_of(parts: Iterable[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]
