"""What the files beside the tokenizer say: added tokens, special tokens, the chat template.

Fine-tunes add tokens to Mixtral's vocabulary and bring a chat template. `tokenizer_config.json` says so, or
in older folders `added_tokens.json` and `special_tokens_map.json`. The template may have a file of its own.
If two files say different things, the one counts that counts in Transformers.

Guarantee: every value has the type that it claims and a bounded size, or a `TokenizerError` says which file
is wrong.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tokenizer.added_tokens import AddedToken
from tokenizer.errors import TokenizerError, quoted
from tokenizer.json_values import is_text

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
MAX_BYTES = 4 << 20  # of one file
MAX_TEMPLATE = 1 << 18  # characters
MAX_TOKENS = 1 << 14
MAX_CONTENT = 1 << 10  # characters of one token
MAX_ID = 1 << 20
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
UNPLACED = -1  # the id of a token for which no file has one


@dataclass(frozen=True)
class Template:
    """The text of a chat template, and the file that it comes from.

    tools  the text of another one for conversations with tools, if there is one
    """

    text: str
    source: str
    tools: str | None = None


class Prefix(Enum):
    """Which texts the encoder begins with a space of its own. Special tokens part one text from the next."""

    EVERY = "every text"
    SPACELESS = "every text that does not begin with a space"
    FIRST = "the text that comes first, if it does not begin with a space"
    NEVER = "none"


@dataclass(frozen=True)
class Settings:
    """What a folder says about its tokenizer.

    prefix    which texts begin with the encoder's space
    added     added tokens, with their ids
    special   special tokens without an id (it is UNPLACED), which their content finds
    names     what templates call special tokens: {"bos_token": "<s>", ...}. None for a null in a file
    ends      the end-of-text tokens of all files
    template  the chat template, if there is one
    """

    prefix: Prefix = Prefix.EVERY
    added: tuple[AddedToken, ...] = ()
    special: tuple[AddedToken, ...] = ()
    names: Mapping[str, str | None] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    template: Template | None = None


def read_settings(folder: Path | None, chat_template: Path | None = None) -> Settings:
    """Return what the files in `folder` say. The chat template may come from another file, `chat_template`.

    Raises `TokenizerError` if a file cannot be read, or if what it says makes no sense.
    """
    given = None if chat_template is None else Template(read_text(chat_template), str(chat_template))
    if folder is None:
        return Settings(template=given)
    config = read_object(folder / CONFIG)
    special = read_object(folder / SPECIAL)
    declared = "added_tokens_decoder" in config
    named = config if declared else {**config, **special}
    steering = tuple(
        special_tokens(named, lambda name: folder / (SPECIAL if name in special and not declared else CONFIG))
    )
    if declared:
        added = declared_tokens(folder / CONFIG, config["added_tokens_decoder"])
    else:
        added = listed_tokens(folder / ADDED, {token.content for token in steering})
    legacy = config.get("legacy")
    if legacy is not None and not isinstance(legacy, bool):
        raise refusal(folder / CONFIG, f"legacy is {quoted(legacy)}", "true or false")
    ends = (
        content_of(folder / name, "eos_token", values)
        for name, values in ((CONFIG, config), (SPECIAL, special))
    )
    return Settings(
        prefix=Prefix.FIRST if legacy is False else Prefix.EVERY,
        added=added,
        special=steering,
        names={
            name: content_of(folder / CONFIG, name, named) for name in named if names_a_token(name, named)
        },
        ends=tuple(dict.fromkeys(end for end in ends if end)),
        template=given or folder_template(folder, config),
    )


def declared_tokens(file: Path, declared: object) -> tuple[AddedToken, ...]:
    """Read `added_tokens_decoder` in `tokenizer_config.json`: {"32000": {"content": "<|im_end|>", ...}}."""
    if not isinstance(declared, Mapping) or len(declared) > MAX_TOKENS:
        raise refusal(
            file, "added_tokens_decoder is no object, or too large", f"one of up to {MAX_TOKENS} tokens"
        )
    tokens = []
    for key, value in declared.items():
        what = f"added token {quoted(key)}"
        if not isinstance(value, Mapping):
            raise refusal(file, f"{what} is {quoted(value)}", "an object with 'content'")
        place = int(key) if re.fullmatch("[0-9]{1,7}", key) else None
        tokens.append(token_of(file, value, known(file, place, what), what))
    return distinct(file, tokens)


def numbered_tokens(file: Path, listed: object) -> tuple[AddedToken, ...]:
    """Read `added_tokens` in `tokenizer.json`: [{"id": 32000, "content": "<|im_end|>", ...}]."""
    if not isinstance(listed, list) or len(listed) > MAX_TOKENS:
        raise refusal(file, "added_tokens is no list, or too long", f"one of up to {MAX_TOKENS} tokens")
    tokens = []
    for value in listed:
        what = f"added token {quoted(value)}"
        if not isinstance(value, Mapping):
            raise refusal(file, what, "an object with 'id' and 'content'")
        tokens.append(token_of(file, value, known(file, value.get("id"), what), what))
    return distinct(file, tokens)


def listed_tokens(file: Path, special: Collection[str]) -> tuple[AddedToken, ...]:
    """Read the tokens of `added_tokens.json`: {"<|im_end|>": 32000}. Other files say which are `special`."""
    listed = read_object(file)
    if len(listed) > MAX_TOKENS:
        raise refusal(file, f"holds {len(listed)} tokens", f"{MAX_TOKENS} at most")
    tokens = []
    for content, place in listed.items():
        what = f"added token {quoted(content)}"
        value = {"content": content, "special": content in special}
        tokens.append(token_of(file, value, known(file, place, what), what))
    return distinct(file, tokens)


def special_tokens(named: Mapping[str, object], file: Callable[[str], Path]) -> Iterator[AddedToken]:
    """Yield special tokens that have names and no ids, in the order in which they would get new ids.

    `file` returns the file that a name comes from.
    """
    order = [name for name in NAMED if name in named]
    order += [name for name in named if name not in NAMED and names_a_token(name, named)]
    values = [(name, named[name]) for name in order if named[name] is not None]
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    if isinstance(extra, Mapping):
        values += extra.items()
    elif isinstance(extra, list):
        values += [("additional_special_tokens", value) for value in extra]
    if len(values) > MAX_TOKENS:
        raise refusal(file(NAMED[0]), f"names {len(values)} special tokens", f"{MAX_TOKENS} at most")
    for name, value in values:
        if isinstance(value, str):
            value = {"content": value}
        if not isinstance(value, Mapping):
            what = f"{quoted(name)} is {quoted(value)}"
            raise refusal(file(name), what, "a token's text, or an object with 'content'")
        yield token_of(file(name), {**value, "special": True}, UNPLACED, quoted(name))


def names_a_token(name: str, values: Mapping[str, object]) -> bool:
    """Tell whether a setting is a special token, as "bos_token" is and "add_bos_token": true is not."""
    return name.endswith("_token") and (name in NAMED or isinstance(values[name], (str, Mapping)))


def content_of(file: Path, name: str, values: Mapping[str, object]) -> str | None:
    value = values.get(name)
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise refusal(file, f"{quoted(name)} is {quoted(value)}", "a token's text")
    return value


def known(file: Path, place: object, what: str) -> int:
    """Return the id of an added token."""
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < MAX_ID:
        raise refusal(file, f"{what} has no id that makes sense", f"one from 0 to {MAX_ID - 1}")
    return place


def token_of(file: Path, value: Mapping[str, object], place: int, what: str) -> AddedToken:
    """Return the token that an object of a file describes. `what` is its name in messages."""
    content = value.get("content")
    if not is_text(content) or not 1 <= len(content) <= MAX_CONTENT:
        raise refusal(
            file, f"{what} has the content {quoted(content)}", f"text of 1 to {MAX_CONTENT} characters"
        )
    flags = {name: value.get(name, False) for name in ("special", "lstrip", "rstrip", "single_word")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise refusal(file, f"{name} of {what} is {quoted(flag)}", "true or false")
    return AddedToken(content, place, **flags)  # type: ignore[arg-type]


def distinct(file: Path, tokens: list[AddedToken]) -> tuple[AddedToken, ...]:
    """Return the tokens in the order of their ids. Raises `TokenizerError` if two share a text or an id."""
    for what, values in (("id", [t.id for t in tokens]), ("text", [t.content for t in tokens])):
        value, count = Counter[object](values).most_common(1)[0] if values else ("", 0)
        if count > 1:
            raise refusal(file, f"{count} added tokens have the {what} {quoted(value)}", "one for each")
    return tuple(sorted(tokens, key=lambda token: token.id))


def folder_template(folder: Path, config: Mapping[str, object]) -> Template | None:
    """Read the chat template: from its own file, else the configuration, else an older kind of file."""
    if is_file(folder / TEMPLATE):
        return Template(read_text(folder / TEMPLATE), TEMPLATE)
    for name, values in ((CONFIG, config), (OLD_TEMPLATE, read_object(folder / OLD_TEMPLATE))):
        value = values.get("chat_template")
        if value is not None:
            return Template(default_template(folder / name, value), name, tool_template(folder / name, value))
    return None


def default_template(file: Path, value: object) -> str:
    """Return a template's text, or of a list of named templates the one called "default"."""
    if isinstance(value, list):
        named = named_templates(value)
        value = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    if not isinstance(value, str):
        raise refusal(
            file, "chat_template is no text and has no default", "a text; or use --chat-template FILE"
        )
    return checked_template(file, value)


def tool_template(file: Path, value: object) -> str | None:
    """Return the text of the template called "tool_use" in a list of named templates, if there is one."""
    text = named_templates(value).get("tool_use") if isinstance(value, list) else None
    return checked_template(file, text) if isinstance(text, str) else None


def named_templates(listed: list[object]) -> dict[str, object]:
    return {str(value.get("name")): value.get("template") for value in listed if isinstance(value, Mapping)}


def checked_template(file: Path, text: str) -> str:
    if len(text) > MAX_TEMPLATE:
        raise refusal(file, f"the chat template has {len(text)} characters", f"{MAX_TEMPLATE} at most")
    return text


def read_text(file: Path) -> str:
    """Read a chat template from a file. Raises `TokenizerError` if there is none in it."""
    try:
        return checked_template(file, read_bytes(file).decode())
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file}: is not UTF-8 (byte {error.start}); give a chat template") from None


def read_object(file: Path) -> dict[str, object]:
    """Read a JSON object, empty if there is no file. Raises `TokenizerError` if the file holds none."""
    if not is_file(file):
        return {}
    try:
        value = json.loads(read_bytes(file))
    except TokenizerError:
        raise
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: is no JSON ({quoted(str(error))}); download it again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: holds a {type(value).__name__} where an object was expected")
    return value


def is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be looked for ({error.strerror}); check the folder") from None


def read_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise TokenizerError(
            f"{file}: cannot be read ({error.strerror}); check the file and its permissions"
        ) from None
    if len(data) > MAX_BYTES:
        raise TokenizerError(
            f"{file}: is larger than {MAX_BYTES} bytes, too large for a tokenizer's settings"
        )
    return data


def refusal(file: Path, wrong: str, due: str) -> TokenizerError:
    return TokenizerError(f"{file}: {wrong}, and must be {due}")
