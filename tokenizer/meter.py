"""Bounds on what a chat template may cost.

A template is a program that comes with the weights. Jinja's sandbox keeps it away from the machine, but it
may run forever, or compute `'a' * 10**10`. So this module rewrites the template's tree before Jinja compiles
it. Every loop, call, filter, test, comparison, operator and output then pays for what it handles.

Guarantee: the allowance bounds the number of operations of a rendering, and the total size of all texts,
lists and numbers that it makes. It does not bound the time of a single operation, which is at most a pass
over some megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from functools import wraps
from typing import Any, cast

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.utils import Namespace, pass_context

OPERATION = 8  # the cost of a turn of a loop, a call or an operator, in addition to its values
MAX_DEPTH = 64  # of lists in lists; the schema of a tool's arguments has two or three for each object
MAX_BITS = 1 << 12  # of a product or power
OPERATORS = frozenset(("+", "-", "*", "/", "//", "%", "**"))
WIDE = re.compile(r"%[^a-zA-Z%]*(\d{3}|\*)")  # '%1000000d' is a format that makes a long text of a short one

FILTERS = frozenset(
    """
    abs capitalize count d default dictsort e escape first float forceescape groupby indent int items join
    last length list lower map max min reject rejectattr replace reverse safe select selectattr sort string
    striptags title tojson trim truncate unique upper urlencode wordcount
    """.split()  # noqa: SIM905
)
METHODS = frozenset(
    """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
    """.split()  # noqa: SIM905
)


class Meter:
    """An allowance, and the functions that take from it."""

    def __init__(self, allowance: int) -> None:
        self.allowance = self.left = allowance

    def charge(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise SecurityError(f"it takes more than the {self.allowance} steps and characters that it may")

    def take(self, *values: object) -> int:
        """Charge for an operation and for all that `values` hold. Return their cost."""
        before = self.left
        self.charge(OPERATION)
        waiting = [(value, 0) for value in values]
        while waiting:
            value, depth = waiting.pop()
            if isinstance(value, str):
                self.charge(1 + len(value))
            elif isinstance(value, int):
                self.charge(1 + value.bit_length() // 3)
            else:
                self.charge(1)
                parts = parts_of(value)
                if parts and depth == MAX_DEPTH:
                    raise SecurityError(f"it makes lists in lists, more than {MAX_DEPTH} deep")
                waiting += [(part, depth + 1) for part in parts]
        return before - self.left

    def result(self, value: Any) -> Any:
        """Charge for a new value. A generator is charged for each value that it makes."""
        if isinstance(value, Generator):
            return self.each(value)
        self.take(value)
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.charge(OPERATION)
            yield value

    def install(self, environment: Environment) -> None:
        """Make templates of this environment pay for all they do."""
        filters = {name: f for name, f in environment.filters.items() if name in FILTERS}
        environment.filters = {name: self.paid(name, f) for name, f in filters.items()}
        environment.filters |= {"!value": pass_context(lambda context, value: self.result(value))}
        environment.filters |= {"!turns": pass_context(lambda context, values: self.each(values))}
        environment.filters |= {"!joined": pass_context(lambda context, values: self.joined(values))}
        environment.tests = {
            name: self.paid(name, cast("Callable[..., Any]", f)) for name, f in environment.tests.items()
        }
        environment.finalize = pass_context(lambda context, value: self.result(value))
        environment.intercepted_binops = OPERATORS  # type: ignore[attr-defined]
        compute, call = environment.call_binop, environment.call  # type: ignore[attr-defined]

        def call_binop(context: Context, operator: str, left: Any, right: Any) -> Any:
            self.before_operator(operator, left, right)
            return self.result(compute(context, operator, left, right))

        def call_anything(context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.take(args, kwargs)
            method = getattr(called, "__wrapped__", called)  # the sandbox wraps a text's `format`
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str):
                self.before_method(method.__name__, owner, args)
            return self.result(call(context, called, *args, **kwargs))

        environment.call_binop, environment.call = call_binop, call_anything  # type: ignore[attr-defined]

    def paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the filter or test `function`, charging for its values and for what it makes of them."""
        own = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja's own argument comes before the value

        @wraps(function)
        def pay(*args: Any, **kwargs: Any) -> Any:
            cost = self.take(args[own:], kwargs)
            if name in GROWING:
                self.charge(GROWING[name](cost, *args[own:], **kwargs))
            return self.result(function(*args, **kwargs))

        return pay

    def joined(self, values: tuple[object, ...]) -> str:
        """`a ~ b`."""
        self.take(values)
        return "".join(map(str, values))

    def before_operator(self, operator: str, left: Any, right: Any) -> None:
        self.take(left, right)
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    self.charge(max(0, times) * (1 + len(many)))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            power, product = left.bit_length() * max(right, 0), left.bit_length() + right.bit_length()
            bits = power if operator == "**" else product
            if bits > MAX_BITS:
                raise SecurityError(f"it computes a number of {min(bits, 10**9)} bits")
        if operator == "%" and isinstance(left, str) and WIDE.search(left):
            raise SecurityError("it formats text to a width of more than 99")

    def before_method(self, name: str, text: str, args: tuple[Any, ...]) -> None:
        if name not in METHODS:
            raise SecurityError(
                f"it calls {name} of a text, which is not among the methods that templates need"
            )
        self.charge(1 + len(text))
        if name == "join" and args:
            self.charge(of_join(0, args[0], text))
        if name == "replace":
            self.charge(of_replace(0, text, *args))


def parts_of(value: object) -> list[object]:
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
        return list(value)
    return []


def of_replace(
    cost: int, text: object, old: object = "", new: object = "", *rest: object, **words: object
) -> int:
    """Return how many characters replacing adds at most, by the method of texts or by Jinja's filter."""
    text, old, new = str(text), str(words.get("old", old)), str(words.get("new", new))
    return text.count(old) * (1 + len(new))


def of_join(cost: int, values: object, d: object = "", attribute: object = None) -> int:
    if isinstance(values, Generator) and d:
        raise SecurityError("it joins what it has not listed; write `| list | join`")
    return len(str(d)) * (len(values) if isinstance(values, (str, *SIZED)) else 0)


def of_indent(cost: int, text: object, width: object = 4, *rest: object, **words: object) -> int:
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise SecurityError("it indents by more than 64")
    return cost * (1 + width)


def of_tojson(cost: int, value: object, *rest: object, **words: object) -> int:
    indent = words.get("indent") or 0
    if rest or not isinstance(indent, int) or not 0 <= indent <= 16 or len(str(words.get("separators"))) > 32:
        raise SecurityError(
            "it writes JSON with an indent of more than 16, or with separators of its own length"
        )
    return cost * (1 + indent) * 4


SIZED = (list, tuple, set, frozenset, dict, range)
GROWING: dict[str, Callable[..., int]] = {
    "replace": of_replace, "join": of_join, "indent": of_indent, "tojson": of_tojson,
}  # fmt: skip


def metered(node: nodes.Node, environment: Environment) -> Any:
    """Return the tree with a payment at every operation. `Meter.install` gives the filters that it names."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, metered(value, environment))
        elif isinstance(value, list):
            setattr(node, name, [metered(v, environment) if isinstance(v, nodes.Node) else v for v in value])

    def pay(inner: Any, how: str) -> nodes.Filter:
        return nodes.Filter(inner, how, [], [], None, None, lineno=node.lineno, environment=environment)

    if isinstance(node, nodes.NSRef) and node.attr.startswith("_"):
        raise SecurityError("it sets an attribute that begins with an underscore")
    if isinstance(node, nodes.For):
        node.iter = pay(node.iter, "!turns")
    elif isinstance(node, nodes.TemplateData):
        return nodes.Const(node.data, lineno=node.lineno, environment=environment)
    elif isinstance(node, nodes.Concat):
        parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno, environment=environment)
        return pay(parts, "!joined")
    elif (
        isinstance(node, (nodes.List, nodes.Dict))
        or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
    ):
        return pay(node, "!value")
    elif isinstance(node, nodes.Compare):
        node.expr = pay(node.expr, "!value")
        for operand in node.ops:
            operand.expr = pay(operand.expr, "!value")
    return node
