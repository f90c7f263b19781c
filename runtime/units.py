"""Sizes as people write and read them."""

import math
import re

from model.errors import quoted
from runtime.errors import OptionError

UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


def parse_bytes(text: str, whole: int | None = None) -> int:
    """Bytes of a size like `11GiB` or `11G` (powers of 1024), `11GB` (powers of 1000), or `90%` of `whole`.

    Raises `OptionError` if `text` is no size, or a percentage above 100 or of an unknown whole.

    >>> parse_bytes("1.5GiB"), parse_bytes("2KB"), parse_bytes("90%", whole=1000), parse_bytes("4096")
    (1610612736, 2000, 900, 4096)
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*|%)\s*", text)
    unit = match[2] if match else ""
    known = {name.lower(): size for name, size in UNITS.items()}
    if match is None or (unit != "%" and unit.lower() not in known):
        raise OptionError(f"{quoted(text)} is not a size: write it like 11GiB, 900MB or 90%")
    if unit != "%":
        return int(float(match[1]) * known[unit.lower()])
    if whole is None:
        raise OptionError(f"{quoted(text)}: how much memory there is cannot be told; write the size in GiB")
    if float(match[1]) > 100:
        raise OptionError(f"{quoted(text)} is more than all there is; write 100% or less")
    return int(float(match[1]) / 100 * whole)


def format_bytes(size: int) -> str:
    """A size with one decimal, in the largest unit that fits.

    >>> format_bytes(25_100_000_000), format_bytes(1536), format_bytes(12)
    ('23.4 GiB', '1.5 KiB', '12 B')
    """
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log2(size)) // 10, 4)
    return f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB"
