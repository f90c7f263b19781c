"""What `quality` measures of each combination of formats, and the tables of it."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from model.errors import ModelError
from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from tools.perplexity import Score

WIDTHS = ("16", "4", "3", "2")
EXPERTS = ("8", "4", "4g128", "3", "3g128", "2", "2g32", "2g64")  # with attention at 4


def parse_formats(text: str) -> Formats:
    """Formats written attention/experts, with the head at 16 bits, or attention/experts/head.

    >>> print(parse_formats("4g64/3g128"), parse_formats("4/3g128/8"), sep="; ")
    attention 4, experts 3g128, head 16; attention 4, experts 3g128, head 8
    """
    parts = text.split("/")
    if len(parts) not in (2, 3):
        raise ModelError(
            f"{text!r} is not a pair of formats: write attention/experts, as in 4/3g128, or "
            "attention/experts/head"
        )
    return Formats(*map(QuantSpec.parse, parts))


def short(formats: Formats) -> str:
    """
    >>> [short(parse_formats(text)) for text in ("4g64/3g128/16", "4/3g128/8g64")]
    ['4/3g128', '4/3g128/8']
    """
    parts = [formats.attention, formats.experts, *[formats.head] * formats.head.quantized]
    return "/".join(map(str, parts))


@dataclasses.dataclass(frozen=True)
class Result:
    """One combination: the bytes of its tensors, the bits of an expert's weight, and its score."""

    formats: Formats
    bytes: int
    expert_bits: float
    score: Score  # in float32
    fast: Score | None = None  # in bfloat16, by the device's fast product

    def better(self, other: "Result") -> bool:
        """Whether this is smaller or predicts better than another, and is no worse in the other respect."""
        mine, others = (self.bytes, self.score.perplexity), (other.bytes, other.score.perplexity)
        return mine != others and mine[0] <= others[0] and mine[1] <= others[1]

    def as_dict(self) -> dict[str, Any]:
        formats = {kind: str(spec) for kind, spec in self.formats.by_kind().items()}
        sizes = {"bytes": self.bytes, "expert_bits": self.expert_bits}
        fast = {"fast": self.fast.as_dict()} if self.fast else {}
        return formats | sizes | {"score": self.score.as_dict()} | fast


def all_formats() -> list[Formats]:
    """The default formats: every pair of widths, then more formats of experts.

    >>> [short(formats) for formats in all_formats()][14:]
    ['2/3', '2/2', '4/8', '4/4g128', '4/3g128', '4/2g32', '4/2g64']
    """
    pairs = [*itertools.product(WIDTHS, WIDTHS), *(("4", experts) for experts in EXPERTS)]
    return list(dict.fromkeys(parse_formats("/".join(pair)) for pair in pairs))


def frontier(results: Iterable[Result]) -> list[Result]:
    """The results that no other is better than, smallest first.

    >>> def result(formats, size, nats):
    ...     return Result(parse_formats(formats), size, 4.0, Score(nats, tokens=1, bytes=1))
    >>> results = [result("4/4", 50, 1.1), result("4/2", 30, 1.9), result("3/4", 51, 1.2)]
    >>> [short(one.formats) for one in frontier(results)]
    ['4/2', '4/4']
    """
    results = list(results)
    best = [one for one in results if not any(other.better(one) for other in results)]
    return sorted(best, key=lambda one: one.bytes)


def table(results: Sequence[Result], base: Result | None, best: Sequence[Result]) -> str:
    """A Markdown table with a row for each result, in the order given. Sizes and perplexities are also
    relative to those of `base`, if there is one. Results among `best` are in bold.

    >>> whole = Result(parse_formats("16/16"), 20_000_000, 16.0, Score(nats=2.0, tokens=1, bytes=1))
    >>> small = Result(parse_formats("4/2g32"), 5_000_000, 2.51, Score(nats=2.1, tokens=1, bytes=1))
    >>> print(table([whole, small], whole, [small]))
    | attention | experts | head | bits per expert weight | MB | of 16/16 | perplexity | over 16/16 | bits per byte |
    |---|---|---|---|---|---|---|---|---|
    | 16 | 16 | 16 | 16.00 | 20.00 | 100.0 % | 7.389 | +0.0 % | 2.8854 |
    | **4** | **2g32** | **16** | 2.51 | 5.00 | 25.0 % | 8.166 | +10.5 % | 3.0297 |
    """  # noqa: E501
    names = ["attention", "experts", "head", "bits per expert weight", "MB", "of 16/16", "perplexity",
             "over 16/16", "bits per byte"]  # fmt: skip
    fast = any(one.fast for one in results)
    names += ["fast product"] * fast
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for one in results:
        bold = "**" if one in best else ""
        size, over = "-", "-"
        if base:
            size = f"{one.bytes / base.bytes:.1%}".replace("%", " %")
            over = f"{one.score.perplexity / base.score.perplexity - 1:+.1%}".replace("%", " %")
        row = [
            *(f"{bold}{spec}{bold}" for spec in one.formats.by_kind().values()),
            f"{one.expert_bits:.2f}", f"{one.bytes / 1e6:.2f}", size,
            f"{one.score.perplexity:.3f}", over, f"{one.score.bits_per_byte:.4f}",
        ]  # fmt: skip
        if fast:
            change = one.fast.perplexity / one.score.perplexity - 1 if one.fast else None
            row.append("-" if change is None else f"{change:+.2%}".replace("%", " %"))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def markdown(results: Sequence[Result]) -> str:
    """Tables of all pairs of widths, of all formats of experts with attention at 4 bits, and of the rest, as
    far as measured. The first two have the head at 16 bits."""
    base = next((one for one in results if not one.formats.quantized), None)
    plain = [one for one in results if not one.formats.head.quantized]
    best = frontier(results)
    pairs = [one for one in plain if {str(one.formats.attention), str(one.formats.experts)}.issubset(WIDTHS)]
    others = sorted(
        (one for one in plain if str(one.formats.attention) == "4" and one.formats.experts.quantized),
        key=lambda one: -one.bytes,
    )
    tables = [table(pairs, base, best)] if pairs else []
    if set(others) - set(pairs):
        tables.append(table(others, base, best))
    rest = [one for one in results if one not in pairs and one not in others]
    if rest:
        tables.append(table(rest, base, best))
    return "\n\n".join([*tables, "In bold: no other measured here is both as small and as good."])
