"""Chat templates, which are programs in Jinja by which a fine-tune writes conversations.

A template runs in Jinja's sandbox, within the bounds of `tokenizer.meter`, and gives what Transformers gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizer.conversation import Turn
from tokenizer.errors import TokenizerError, quoted
from tokenizer.settings import Template

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

BASE = 1 << 22  # what any template may cost, in the units of `tokenizer.meter`
WORK = 64  # what it may cost in addition for each character of the template and of the conversation
# A block that marks what the model has written, for training. Here it is a block like any other.
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def render(
    template: Template,
    given: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]],
    names: Mapping[str, str | None],
    prompt: bool = True,
) -> str:
    """Return the conversation as `template` writes it, up to where the answer begins if `prompt`.

    `given` has messages and tools. `names` has special tokens by the names that templates use, such as
    "bos_token".

    Raises `TokenizerError` if the template refuses the conversation, fails, or costs too much.
    """
    messages, tools = given
    program = template.tools if tools and template.tools is not None else template.text
    variables = {name: value for name, value in names.items() if value is not None}
    try:
        size = len(program) + len(to_json([messages, tools]))
        compiled = compile_template(program, BASE + WORK * size)
        text: str = compiled.render(
            **variables,
            messages=[dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            documents=None,
            add_generation_prompt=prompt,
        )
        text.encode()  # a template can spell half of a surrogate pair, which is no text
    except Exception as error:  # a template can fail in any way
        reason = quoted(str(error) or type(error).__name__, 200)
        raise TokenizerError(
            f"{template.source}: the chat template does not write this conversation ({reason}); "
            "change the conversation, or give another template with --chat-template FILE"
        ) from None
    return text


def reads_tools(template: Template) -> bool:
    """Tell whether a template writes tools: whether it reads the variable of this name."""
    from jinja2 import nodes

    if template.tools is not None:
        return True
    try:
        tree = make_environment().parse(GENERATION.sub(plain_block, template.text))
        return any(node.name == "tools" and node.ctx == "load" for node in tree.find_all(nodes.Name))
    except Exception:  # what the template does not say, `render` says
        return False


def compile_template(text: str, allowance: int) -> Any:
    """Compile a template for one rendering, which may cost the `allowance`."""
    from tokenizer.meter import Meter, metered

    environment = make_environment()
    environment.filters["tojson"] = to_json
    environment.globals = {
        "range": environment.globals["range"],
        "namespace": environment.globals["namespace"],
        "dict": make_dict,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    Meter(allowance).install(environment)
    tree = environment.parse(GENERATION.sub(plain_block, text))
    return environment.from_string(metered(tree, environment))


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return Jinja as templates of conversations are written for it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], optimized=False
    )


def plain_block(tag: re.Match[str]) -> str:
    """
    >>> GENERATION.sub(plain_block, "{%- generation %}x{% endgeneration -%}")
    '{%- if true %}x{% endif -%}'
    """
    return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_dict(*pairs: Any, **items: Any) -> dict[Any, Any]:
    return dict(*pairs, **items)


def raise_exception(message: object) -> None:
    raise ValueError(str(message))


def strftime_now(form: str) -> str:
    return datetime.now().strftime(str(form)[:200])


def turn_end(write: Callable[[Sequence[Turn]], list[str | int]]) -> int | None:
    """Return the control token that `write` puts after an answer. None if it puts none directly after it."""
    answer = "An answer."
    try:
        parts = write([Turn("user", "A question."), Turn("assistant", answer), Turn("user", "Another one.")])
    except TokenizerError:
        return None
    for part, following in pairwise(parts):
        if isinstance(part, str) and part.rstrip().endswith(answer) and isinstance(following, int):
            return following
    return None
