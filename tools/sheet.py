"""A planner's sheet: a model's plans for several sizes of memory, as a table or as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.planning.plan import Plan, describe_slots, milliseconds
from runtime.planning.planner import larger_than_memory
from runtime.planning.rank_plans import RankPlans, describe
from runtime.planning.request import Request
from runtime.planning.search import excess_bytes, used_bytes
from runtime.units import format_bytes

LINKS = (12, 25)  # GB/s: what PCIe 3.0 and 4.0 with 16 lanes move in practice
DISKS = (0.5, 2, 6)  # GB/s: SATA, a virtual machine's disk, NVMe
NETWORKS = (1, 10)  # Gbit/s: Ethernet
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
    ranks: RankPlans | None = None  # if the columns are ranks of one model, and all have plans

    @property
    def plans(self) -> list[tuple[Column, Plan]]:
        return [(column, column.plan) for column in self.columns if column.plan]

    @property
    def about(self) -> dict[str, str]:
        """What all columns have in common."""
        r = self.columns[0].request
        dtype = str(r.dtype).removeprefix("torch.")
        formats = {kind: str(spec) for kind, spec in r.formats.by_kind().items()}
        about = {"model": self.model} | formats | {"dtype": dtype, "device": str(r.target.device)}
        card = r.target.capability
        return about | ({"capability": "{}.{}".format(*card)} if card else {})


def term_rows(sheet: Sheet) -> list[tuple[str, list[int]]]:
    """The terms that are not 0 in all plans, each with its bytes in every plan."""
    table = [(label, [getattr(plan, name) for _, plan in sheet.plans]) for name, label in TERMS.items()]
    rest = [column.left_over_bytes for column, _ in sheet.plans]
    known = [size for size in rest if size is not None]
    same = len(known) == len(rest)  # of ranks, one may have a limit and another none
    return [row for row in table if any(row[1])] + ([("left over", known)] if same else [])


def table_rows(sheet: Sheet) -> list[list[str]]:
    """The whole table. One plan has GiB and bytes side by side, several have GiB above and bytes below, and
    so have ranks."""
    plans, terms = [plan for _, plan in sheet.plans], term_rows(sheet)
    unit, power = ("GiB", 30) if max(plan.device_bytes for plan in plans) >= 1 << 30 else ("MiB", 20)
    slots = [
        f"all {p.slots_per_layer[0]}" if p.resident else describe_slots(p.slots_per_layer) for p in plans
    ]
    counts = [["slots per layer", *slots], ["spare slots", *(str(p.spares) for p in plans)]]
    if any(p.berths for p in plans):
        counts.append(["berths in host memory", *(describe_berths(p) for p in plans)])
    if any(p.tiered for p in plans):
        counts.append(["experts read from files", *(str(p.file_experts) for p in plans)])
    counts.append(["tokens in a chunk", *(str(p.chunk) for p in plans)])
    labels = [column.label for column, _ in sheet.plans]
    if len(plans) == 1 and not sheet.ranks:
        both = [[label, f"{size / 2**power:.2f}", f"{size:,}"] for label, [size] in terms]
        return [[*labels, unit, "bytes"], *both, *([label, "", count] for label, count in counts)]
    rounded = [[f"{label}, {unit}", *(f"{size / 2**power:.2f}" for size in sizes)] for label, sizes in terms]
    exact = [[f"{label}, bytes", *(f"{size:,}" for size in sizes)] for label, sizes in terms]
    return [["", *labels], *rank_rows(sheet), *counts, *rounded, *exact]


def rank_rows(sheet: Sheet) -> list[list[str]]:
    """What tells ranks apart: their devices and layers. Without ranks there is nothing to tell."""
    if sheet.ranks is None:
        return []
    devices = [plan.where for plan in sheet.ranks.plans]
    return [["computes in", *devices], ["has", *map(describe, sheet.ranks.parts)]]


def describe_berths(plan: Plan) -> str:
    """How many experts host memory has room for, of how many."""
    return (
        f"{plan.berths} of {plan.experts}" if plan.tiered else f"all {plan.experts}" if plan.berths else "0"
    )


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
    if sheet.about.get("capability") not in (None, "8.0"):
        title += f" of compute capability {sheet.about['capability']}"
    if sheet.ranks:
        title = "{model}, attention {attention}, experts {experts}, head {head}".format(**sheet.about)
        title += f", on {len(sheet.columns)} rank{'s' * (len(sheet.columns) > 1)}"
    tiers = [describe_misses("a miss takes", host_misses(plan))]
    if any(plan.tiered for _, plan in sheet.plans):
        tiers.append(describe_misses("one that is read from files takes", file_misses(plan)))
    return "\n".join(
        [
            f"{title}, context {plan.context} tokens",
            *gap,
            *layout(table_rows(sheet), markdown),
            *gap,
            f"An expert is {format_bytes(plan.blob_bytes)} ({plan.blob_bytes:,} bytes); {'; '.join(tiers)}.",
            *([describe_crossing(sheet.ranks)] if sheet.ranks and sheet.ranks.hops else []),
            *(f"{column.label}: {column.remark}" for column in sheet.columns if column.remark),
        ]
    )


def describe_crossing(ranks: RankPlans) -> str:
    """What crosses between ranks, and how long usual networks take to carry it, by arithmetic."""
    widest = max(ranks.hops, key=lambda hop: hop.token_bytes)
    each, chunk = carried(widest.token_bytes), carried(widest.chunk_bytes)
    taken = [
        f"{1e6 * each[rate]:.2g} us and {milliseconds(chunk[rate])} at {rate} Gbit/s" for rate in NETWORKS
    ]
    what = f"{format_bytes(widest.token_bytes)} and {format_bytes(widest.chunk_bytes)}"
    return f"{ranks.crossing}\n{what} take {', '.join(taken)}, and the network's latency."


def carried(size: int) -> dict[float, float]:
    """Seconds that so many bytes take, by Gbit/s."""
    return {rate: size * 8 / rate / 1e9 for rate in NETWORKS}


def describe_misses(what: str, misses: dict[float, float]) -> str:
    return f"{what} {', '.join(f'{milliseconds(s)} at {rate:g} GB/s' for rate, s in misses.items())}"


def host_misses(plan: Plan) -> dict[float, float]:
    """Seconds that an expert takes from host memory, by GB/s of the link: the given one, or usual ones."""
    rates = (plan.link_gbps,) if plan.link_gbps else LINKS
    return {rate: plan.blob_bytes / rate / 1e9 for rate in rates}


def file_misses(plan: Plan) -> dict[float, float]:
    """Seconds that an expert takes from files, by GB/s of the disk: the given one, or usual ones. The link is
    the slowest of `host_misses`."""
    rates, slowest = (plan.disk_gbps,) if plan.disk_gbps else DISKS, min(host_misses(plan))
    found = {rate: replace(plan, disk_gbps=rate, link_gbps=slowest).file_miss_seconds for rate in rates}
    return {rate: seconds for rate, seconds in found.items() if seconds is not None}


def as_json(sheet: Sheet) -> dict[str, Any]:
    """Everything, in bytes."""
    columns: list[dict[str, Any]] = []
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
            about["seconds_per_miss"] = by_rate(host_misses(plan))
            about["seconds_per_miss_from_files"] = by_rate(file_misses(plan) if plan.tiered else {})
        columns.append(about)
    if sheet.ranks is None:
        return sheet.about | {"plans": columns}
    told = sheet.ranks.as_dict()
    ranks = [rank | column for rank, column in zip(told["ranks"], columns, strict=True)]
    hops = [
        hop | {"seconds_per_token": by_rate(carried(hop["token_bytes"]), "Gbit/s")} for hop in told["hops"]
    ]
    common = {name: sheet.about[name] for name in ("model", "attention", "experts", "head")}
    return common | {"ranks": ranks, "hops": hops}


def by_rate(seconds: dict[float, float], unit: str = "GB/s") -> dict[str, float]:
    return {f"{rate:g} {unit}": s for rate, s in seconds.items()}
