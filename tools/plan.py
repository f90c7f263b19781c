"""What a model would take of a device's memory, before there is a model or a device.

    python -m tools.plan --shape mixtral-8x7b --attention 4 --experts 2 --vram 8GiB,11GiB,24GiB
    python -m tools.plan path/to/checkpoint --vram 11GiB --ram 32GiB --context 8192

Of a checkpoint only headers are read. With --attention, --experts or --head it is planned as if it were
quantized so. The device is a CUDA card of compute capability 8.0 or later with --vram of memory, and need not
be there. What PyTorch takes beside tensors is counted as on the card where that is most. With --device cpu
everything is in --ram, in the form that this machine's CPU computes with.

Several sizes give a table. For a size that is too small, the reason takes the place of the column. If every
size is too small, the exit status is 1.
"""

from runtime.shell.command import DONE, FAILED, launch, put, run, say

if __name__ == "__main__":
    launch("tools.plan")

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.errors import ModelError
from model.quant.formats import KINDS, PLAIN, Formats
from model.quant.spec import QuantSpec
from model.shapes import SHAPES
from model.target import Target
from runtime.errors import DeviceError, OptionError
from runtime.options import EngineOptions
from runtime.planning.plan import Plan, describe_slots
from runtime.planning.planner import larger_than_memory, make_plan
from runtime.planning.request import Budgets, Request
from runtime.planning.search import excess_bytes, used_bytes
from runtime.shell.arguments import add_flag, from_flags, new_parser
from runtime.units import format_bytes

ENGINE_FLAGS = (
    "dtype", "map", "context", "offload", "slots", "berths", "lookahead", "prefetch",
    "link_gbps", "disk_gbps",
)  # fmt: skip
LINKS = (12, 25)  # GB/s: what PCIe 3.0 and 4.0 with 16 lanes move in practice
TERMS = {  # labels of a plan's fields
    "trunk_bytes": "trunk",
    "kv_bytes": "KV cache",
    "workspace_bytes": "workspace",
    "staging_bytes": "staging",
    "overhead_bytes": "overhead",
    "slots_bytes": "slots",
    "driver_bytes": "driver",
    "device_bytes": "device, all",
    "arena_bytes": "arena, in host memory",
    "mapped_bytes": "mapped from files",
}


@dataclass(frozen=True)
class Column:
    """One size of memory, as the user wrote it, with its plan or with the reason why there is none."""

    label: str
    request: Request
    plan: Plan | None
    reason: str = ""

    @property
    def budget_bytes(self) -> int | None:
        return self.request.budgets.device.bytes

    @property
    def left_over_bytes(self) -> int | None:
        """What the plan leaves of the budget."""
        assert self.plan is not None
        budget = self.budget_bytes
        return None if budget is None else budget - used_bytes(self.request, self.plan)

    @property
    def remark(self) -> str | None:
        """Why there is no plan, or that the plan's files exceed the memory."""
        return larger_than_memory(self.request, self.plan) if self.plan else self.reason


@dataclass(frozen=True)
class Sheet:
    """All that is printed about a model. There is at least one column."""

    model: str
    columns: Sequence[Column]

    @property
    def plans(self) -> list[tuple[Column, Plan]]:
        return [(column, column.plan) for column in self.columns if column.plan]

    @property
    def about(self) -> dict[str, str]:
        """What all columns have in common."""
        r = self.columns[0].request
        dtype = str(r.dtype).removeprefix("torch.")
        formats = {kind: str(spec) for kind, spec in r.formats.by_kind().items()}
        return {"model": self.model} | formats | {"dtype": dtype, "device": str(r.target.device)}


def make_sheet(args: argparse.Namespace) -> Sheet:
    """Plan the model for each size. A size that is too small gives a column without a plan.

    Raises `ModelError` if the checkpoint cannot be used, and `OptionError` if an option makes no sense.
    """
    on_cpu = args.device == "cpu"
    sized = "ram" if on_cpu else "vram"
    if not on_cpu and args.ram and "," in args.ram:
        raise OptionError(f"ram is {args.ram}; one size goes with all of --vram")
    model, files = describe_model(args)
    target = Target.of(torch.device("cpu")) if on_cpu else Target.hypothetical()
    text = getattr(args, sized)
    sizes: list[str | None] = text.split(",") if text else [None]
    requests = []
    for size in sizes:
        options = from_flags(EngineOptions, argparse.Namespace(**vars(args) | {sized: size}))
        requests.append(make_request(model, files, options, target))
    columns = [make_column(size, request) for size, request in zip(sizes, requests, strict=True)]
    return Sheet(args.shape or str(args.model), columns)


def describe_model(args: argparse.Namespace) -> tuple[tuple[ModelConfig, Formats], torch.dtype | None]:
    """The configuration and the formats of the weights, and what `Checkpoint.mappable` would be."""
    given = {kind: getattr(args, kind) for kind in KINDS}
    try:
        asked = {kind: QuantSpec.parse(text) for kind, text in given.items() if text is not None}
    except ModelError as error:
        raise OptionError(str(error)) from error
    checkpoint = None if args.shape else open_checkpoint(args.model)
    config = checkpoint.config if checkpoint else SHAPES[args.shape]
    stored = checkpoint.formats if checkpoint else PLAIN
    formats, files = dataclasses.replace(stored, **asked), checkpoint.mappable if checkpoint else None
    if formats != stored:  # as tools.quantize would write it
        files = torch.bfloat16
    return (config, formats), files


def make_request(
    model: tuple[ModelConfig, Formats],
    files: torch.dtype | None,
    options: EngineOptions,
    target: Target,
) -> Request:
    try:
        return Request.make(*model, options, target, Budgets.given(options, target.device), files)
    except ModelError as error:  # a format that does not divide this model's matrices
        raise OptionError(str(error)) from error


def make_column(size: str | None, request: Request) -> Column:
    label = "no limit" if size is None else size.strip()
    try:
        return Column(label, request, make_plan(request))
    except DeviceError as error:
        return Column(label, request, None, str(error))


def term_rows(sheet: Sheet) -> list[tuple[str, list[int]]]:
    """The terms that are not 0 in all plans, each with its bytes in every plan."""
    table = [(label, [getattr(plan, name) for _, plan in sheet.plans]) for name, label in TERMS.items()]
    rest = [column.left_over_bytes for column, _ in sheet.plans]
    known = [size for size in rest if size is not None]
    return [row for row in table if any(row[1])] + ([("left over", known)] if known else [])


def table_rows(sheet: Sheet) -> list[list[str]]:
    """The whole table. One plan has GiB and bytes side by side, several have GiB above and bytes below."""
    plans, terms = [plan for _, plan in sheet.plans], term_rows(sheet)
    unit, power = ("GiB", 30) if max(plan.device_bytes for plan in plans) >= 1 << 30 else ("MiB", 20)
    slots = [
        f"all {p.slots_per_layer[0]}" if p.resident else describe_slots(p.slots_per_layer) for p in plans
    ]
    counts = [["slots per layer", *slots], ["spare slots", *(str(p.spares) for p in plans)]]
    counts.append(["tokens in a chunk", *(str(p.chunk) for p in plans)])
    labels = [column.label for column, _ in sheet.plans]
    if len(plans) == 1:
        both = [[label, f"{size / 2**power:.2f}", f"{size:,}"] for label, [size] in terms]
        return [[*labels, unit, "bytes"], *both, *([label, "", count] for label, count in counts)]
    rounded = [[f"{label}, {unit}", *(f"{size / 2**power:.2f}" for size in sizes)] for label, sizes in terms]
    exact = [[f"{label}, bytes", *(f"{size:,}" for size in sizes)] for label, sizes in terms]
    return [["", *labels], *counts, *rounded, *exact]


def layout(table: list[list[str]], markdown: bool) -> list[str]:
    """Lines of a table whose first column is flush left and whose others are flush right.

    >>> layout([["", "8GiB"], ["trunk", "1.17"]], markdown=True)
    ['|       | 8GiB |', '|---|---:|', '| trunk | 1.17 |']
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    if not markdown:
        return ["  ".join(row).rstrip() for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|---|{'---:|' * len(widths[1:])}", *lines[1:]]


def as_text(sheet: Sheet, markdown: bool = False) -> str:
    """Title, table, what a miss costs, and a line for each size that is too small."""
    plan, gap = sheet.plans[0][1], [""] * markdown
    title = "{model}, attention {attention}, experts {experts}, head {head}, in {dtype} on {device}".format(
        **sheet.about
    )
    costs = link_seconds(plan).items()
    at = ", ".join(f"{1000 * seconds:.2g} ms at {rate} GB/s" for rate, seconds in costs)
    return "\n".join(
        [
            f"{title}, context {plan.context} tokens",
            *gap,
            *layout(table_rows(sheet), markdown),
            *gap,
            f"An expert is {format_bytes(plan.blob_bytes)} ({plan.blob_bytes:,} bytes); a miss takes {at}.",
            *(f"{column.label}: {column.remark}" for column in sheet.columns if column.remark),
        ]
    )


def link_seconds(plan: Plan) -> dict[int, float]:
    """Seconds that copying one expert takes, by GB/s of the link."""
    return {rate: plan.blob_bytes / (rate * 1e9) for rate in LINKS}


def as_json(sheet: Sheet) -> dict[str, Any]:
    """Everything, in bytes."""
    columns = []
    for column in sheet.columns:
        about: dict[str, Any] = {
            "size": column.label,
            "budget_bytes": column.budget_bytes,
            "error": column.reason or None,
        }
        if plan := column.plan:
            about |= plan.as_dict() | {"resident": plan.resident, "device_bytes": plan.device_bytes}
            about |= {"host_bytes": plan.host_bytes, "left_over_bytes": column.left_over_bytes}
            about["excess_bytes"] = excess_bytes(column.request, plan)
            about["seconds_per_miss"] = {f"{rate} GB/s": s for rate, s in link_seconds(plan).items()}
        columns.append(about)
    return sheet.about | {"plans": columns}


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("tools.plan", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="checkpoint folder")
    model.add_argument("--shape", choices=tuple(SHAPES), help="a model that need not be there")
    parser.add_argument(
        "--attention",
        metavar="SPEC",
        help="16, 8, 4, 3 or 2, or like 3g128 (default: the checkpoint's, or 16)",
    )
    parser.add_argument("--experts", metavar="SPEC", help="the same for experts")
    parser.add_argument("--head", metavar="SPEC", help="the same for the head")
    parser.add_argument(
        "--vram", metavar="SIZE[,SIZE...]", help="device memory to use at most (default: no limit)"
    )
    parser.add_argument("--ram", metavar="SIZE", help="host memory to use at most (default: no limit)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    engine = parser.add_argument_group("as an engine holds it")
    for field in dataclasses.fields(EngineOptions):
        if field.name in ENGINE_FLAGS:
            add_flag(engine, field)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(lambda: say_plan(argv))


def say_plan(argv: list[str] | None) -> int:
    """Do what the command line asks. Sizes that are too small are reported, other errors are raised."""
    args = make_parser().parse_args(argv)
    sheet = make_sheet(args)
    if args.json:
        put(json.dumps(as_json(sheet), indent=2) + "\n")
    elif sheet.plans:
        put(as_text(sheet, args.markdown) + "\n")
    if sheet.plans:
        return DONE
    for column in sheet.columns:
        say(f"error: {column.label}: {column.reason}")
    return FAILED
