"""Reports as text: names and values on lines, and tables."""

from collections.abc import Sequence
from typing import Any


def as_text(report: dict[str, Any], indent: str = "") -> str:
    """Names and values on lines; a report inside it is indented, and a list of reports is a table.

    >>> report = {"machine": {"cores": 2}, "warm": [{"kind": "x", "seconds": 0.51234567}], "slots": [4]}
    >>> print(as_text(report))
    slots  [4]
    machine
      cores  2
    warm
      kind  seconds
         x   0.5123
    """
    plain = {name: value for name, value in report.items() if not nested(value)}
    width = max(map(len, plain), default=0)
    lines = [f"{indent}{name:{width}}  {show(value)}" for name, value in plain.items()]
    for name, value in report.items():
        if nested(value):
            shown = as_text if isinstance(value, dict) else table
            lines += [f"{indent}{name}", shown(value, indent + "  ")]
    return "\n".join(lines)


def nested(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def table(rows: Sequence[dict[str, Any]], indent: str = "") -> str:
    """Rows under the names of the first row's values, all aligned to the right.

    >>> print(table([{"slots": 1, "lru": 0.25}, {"slots": 10, "lru": 1.0}]))
    slots   lru
        1  0.25
       10     1
    """
    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(indent + "  ".join(map(str.rjust, row, widths)) for row in cells)


def show(value: object) -> str:
    """
    >>> show(0.51234567), show(12345), show(True), show("4g64")
    ('0.5123', '12,345', 'True', '4g64')
    """
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
