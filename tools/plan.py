"""Where each byte of a model would go on a device of a given size, before there is a model or a device.

    python -m tools.plan --shape mixtral-8x7b --attention 4 --experts 2 --vram 8GiB,11GiB,24GiB
    python -m tools.plan path/to/checkpoint --vram 11GiB --ram 32GiB --context 8192

Of a checkpoint only headers are read; with --attention or --experts it is planned as if quantized so. The
device is a CUDA card of compute capability 8.0 or later with --vram to give, and need not be there; what
PyTorch takes beside tensors is counted as on the one where that is most. With --device cpu everything is in
--ram, in the form that this machine's CPU computes with.

Several sizes give a table. Where the model does not fit, the reason takes the place of the column; if it fits
nowhere, the exit status is 1.
"""

from runtime.shell.command import DONE, FAILED, launch, put, run, say

if __name__ == "__main__":
    launch("tools.plan")

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.attention import Attending
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.errors import ModelError
from model.quant.backends.fused import CAPABILITY
from model.quant.expert import blob_bytes
from model.quant.product import scratch_bytes
from model.quant.spec import QuantSpec
from model.shapes import SHAPES
from runtime.errors import DeviceError, LoadError, OptionError
from runtime.loader import attention_bytes
from runtime.options import DTYPES, OFFLOAD, EngineOptions
from runtime.planning.device import choose_dtype
from runtime.planning.footprint import describe_slots
from runtime.planning.memory import driver_bytes, overhead_bytes
from runtime.planning.planner import Plan, count_weights, plan
from runtime.planning.setup import DEFAULT_CONTEXT
from runtime.shell.arguments import new_parser
from runtime.units import format_bytes, parse_bytes

LINKS = (12, 25)  # GB/s: what PCIe 3.0 and 4.0 with 16 lanes move in practice
TERMS = {  # labels of what `Plan` has under these names
    "trunk_bytes": "trunk",
    "kv_bytes": "KV cache",
    "workspace_bytes": "workspace",
    "staging_bytes": "staging",
    "overhead_bytes": "overhead",
    "slots_bytes": "slots",
    "driver_bytes": "driver",
    "device_bytes": "device, all",
    "arena_bytes": "arena, in host memory",
}


@dataclass(frozen=True)
class Column:
    """One size of memory, as it was written, and what comes of it: a plan, or why there is none."""

    label: str
    budget: int | None  # bytes
    plan: Plan | None
    reason: str = ""


@dataclass(frozen=True)
class Sheet:
    """All that is printed."""

    model: str
    attention: str
    experts: str
    dtype: str
    device: str
    config: ModelConfig
    columns: Sequence[Column]

    @property
    def plans(self) -> list[tuple[Column, Plan]]:
        return [(column, column.plan) for column in self.columns if column.plan]

    @property
    def title(self) -> str:
        formats = f"attention {self.attention}, experts {self.experts}"
        return f"{self.model}, {formats}, in {self.dtype} on {self.device}"


def make_sheet(args: argparse.Namespace) -> Sheet:
    """Raises `LoadError` and `OptionError`; a size that is too small is a column without a plan."""
    options = EngineOptions(
        dtype=args.dtype, context=args.context, slots=args.slots, lookahead=args.lookahead,
        prefetch=args.prefetch, offload=args.offload,
    )  # fmt: skip
    config, attention, experts, name = describe_model(args)
    if args.context is not None and args.context > config.context:
        raise OptionError(f"context is {args.context}, and this model was made for at most {config.context}")
    device, cpu = torch.device(args.device), args.device == "cpu"
    if cpu and args.vram:
        raise OptionError(f"vram is {args.vram}, and the device is the CPU; limit it with --ram")
    sizes = parse_sizes("ram", args.ram) if cpu else parse_sizes("vram", args.vram)
    host = [] if cpu else parse_sizes("ram", args.ram)
    if len(host) > 1:
        raise OptionError(f"ram is {args.ram}; one size goes with all of --vram")
    quantized = attention.quantized or experts.quantized
    dtype = torch.bfloat16  # unlike `choose_dtype`, without asking a card that need not be there
    if cpu or options.dtype:
        dtype = choose_dtype(options.dtype, device, sum(count_weights(config)), quantized)
    try:
        attempt = partial(
            plan,
            config,
            dtype,
            options.context or min(DEFAULT_CONTEXT, config.context),
            attention_bytes(config, attention, dtype, device),
            blob_bytes(config, experts, dtype, device),
            scratch_bytes(device, max(config.hidden, config.ffn), dtype) if quantized else 0,
            driver_bytes(device),
            overhead=overhead_bytes(device),
            attending=Attending.of(config, dtype, None if cpu else CAPABILITY),
            host_budget=host[0][1] if host else None,
            shared=cpu,
            slots=options.slots,
            lookahead=options.lookahead,
            prefetch=options.prefetch,
            offload=options.offload,
            place="host memory" if cpu else "device memory",
        )
    except ModelError as error:  # a format that does not divide this model's matrices
        raise OptionError(str(error)) from error
    columns = [try_size(attempt, label, size) for label, size in sizes]
    columns = columns or [try_size(attempt, "no limit", None)]
    dtype_name = str(dtype).removeprefix("torch.")
    return Sheet(name, str(attention), str(experts), dtype_name, args.device, config, columns)


def describe_model(args: argparse.Namespace) -> tuple[ModelConfig, QuantSpec, QuantSpec, str]:
    """Configuration, formats of attention and experts, and name."""
    try:
        wishes = [None if text is None else QuantSpec.parse(text) for text in (args.attention, args.experts)]
    except ModelError as error:
        raise OptionError(str(error)) from error
    if args.shape:
        return SHAPES[args.shape], wishes[0] or QuantSpec(16), wishes[1] or QuantSpec(16), args.shape
    try:
        checkpoint = open_checkpoint(args.model)
    except ModelError as error:
        raise LoadError(str(error)) from error
    attention, experts = wishes[0] or checkpoint.attention, wishes[1] or checkpoint.experts
    return checkpoint.config, attention, experts, str(args.model)


def parse_sizes(name: str, text: str | None) -> list[tuple[str, int]]:
    """`8GiB,11GiB` as labels and bytes. Raises `OptionError`."""
    sizes = []
    for label in text.split(",") if text else []:
        try:
            size = parse_bytes(label)
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from error
        sizes.append((label.strip(), size))
    return sizes


def try_size(attempt: Callable[..., Plan], label: str, size: int | None) -> Column:
    try:
        return Column(label, size, attempt(budget=size))
    except DeviceError as error:
        return Column(label, size, None, str(error))


def left_over(sheet: Sheet, column: Column, plan: Plan) -> int | None:
    """Bytes of the budget that nothing takes."""
    if column.budget is None:
        return None
    return column.budget - plan.device_bytes - (plan.arena_bytes if sheet.device == "cpu" else 0)


def term_rows(sheet: Sheet) -> list[tuple[str, list[int]]]:
    """The terms that any plan has, each with its bytes in every plan."""
    table = [(label, [getattr(plan, name) for _, plan in sheet.plans]) for name, label in TERMS.items()]
    rest = [left_over(sheet, column, plan) for column, plan in sheet.plans]
    known = [size for size in rest if size is not None]
    return [row for row in table if any(row[1])] + ([("left over", known)] if known else [])


def table_rows(sheet: Sheet) -> list[list[str]]:
    """The whole table: of one plan GiB and bytes side by side, of several GiB above and bytes below."""
    plans, terms = [plan for _, plan in sheet.plans], term_rows(sheet)
    unit, power = ("GiB", 30) if max(plan.device_bytes for plan in plans) >= 1 << 30 else ("MiB", 20)
    slots = [
        f"all {sheet.config.experts}" if p.resident else describe_slots(p.slots_per_layer) for p in plans
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
    """Lines of a table whose columns, but for the first, end flush.

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
    costs = link_seconds(plan).items()
    at = ", ".join(f"{1000 * seconds:.2g} ms at {rate} GB/s" for rate, seconds in costs)
    return "\n".join(
        [
            f"{sheet.title}, context {plan.context} tokens",
            *gap,
            *layout(table_rows(sheet), markdown),
            *gap,
            f"An expert is {format_bytes(plan.blob_bytes)} ({plan.blob_bytes:,} bytes); a miss takes {at}.",
            *(f"{column.label}: {column.reason}" for column in sheet.columns if not column.plan),
        ]
    )


def link_seconds(plan: Plan) -> dict[int, float]:
    """What it takes to copy one expert, by GB/s of the link."""
    return {rate: plan.blob_bytes / (rate * 1e9) for rate in LINKS}


def as_json(sheet: Sheet) -> dict[str, Any]:
    """Everything, in bytes."""
    columns = []
    for column in sheet.columns:
        about: dict[str, Any] = {
            "size": column.label,
            "budget_bytes": column.budget,
            "error": column.reason or None,
        }
        if plan := column.plan:
            about |= dataclasses.asdict(plan)
            about |= {"resident": plan.resident, "device_bytes": plan.device_bytes}
            about |= {"host_bytes": plan.host_bytes, "left_over_bytes": left_over(sheet, column, plan)}
            about["seconds_per_miss"] = {f"{rate} GB/s": s for rate, s in link_seconds(plan).items()}
        columns.append(about)
    names = ("model", "attention", "experts", "dtype", "device")
    return {name: getattr(sheet, name) for name in names} | {"plans": columns}


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("tools.plan", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="checkpoint folder")
    model.add_argument("--shape", choices=tuple(SHAPES), help="a model that need not be there")
    parser.add_argument(
        "--attention", metavar="SPEC", help="16, 8, 4, 3 or 2, or like 3g128 (default: as it is)"
    )
    parser.add_argument("--experts", metavar="SPEC", help="the same for experts")
    parser.add_argument("--vram", metavar="SIZE[,SIZE...]", help="device memory to give (default: no limit)")
    parser.add_argument("--ram", metavar="SIZE", help="host memory to give (default: no limit)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="what to compute in (default: bfloat16 on cuda)")
    defaults = {field.name: field.default for field in dataclasses.fields(EngineOptions)}
    parser.add_argument(
        "--context", type=int, metavar="N", help=f"tokens of KV cache (default: {DEFAULT_CONTEXT})"
    )
    parser.add_argument("--offload", choices=OFFLOAD, default=defaults["offload"], help="default: auto")
    parser.add_argument(
        "--slots", type=int, metavar="N", help="slots of each layer (default: as many as fit)"
    )
    for name, what in (("lookahead", "layers to look ahead"), ("prefetch", "experts guessed for each")):
        parser.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            default=defaults[name],
            help=f"{what} (default: {defaults[name]})",
        )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(lambda: say_plan(argv))


def say_plan(argv: list[str] | None) -> int:
    """Do what the command line asks. All that can go wrong is raised, but for sizes that are too small."""
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
