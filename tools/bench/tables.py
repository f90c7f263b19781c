"""The results of `tools.bench gpu` as tables for docs/benchmarks.md, aims beside figures.

What was not measured says so, and why. No figure is computed here but ratios of measured ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.units import format_bytes, parse_bytes

Results = Mapping[str, Mapping[str, Any]]  # by part: "command", "seconds", and "report" or "error"


def tables(results: Results) -> str:
    """All tables, in Markdown."""
    sections = [heading(results)]
    for title, aim, parts, make in SECTIONS:
        there = {name: results[name] for name in results if name.split("-")[0] in parts}
        lines = [f"## {title}", "", f"Aim: {aim}", ""] if aim else [f"## {title}", ""]
        for name, result in there.items():
            lines.append(f"- {name}: `{result['command']}`, {result['seconds']:.0f} s{problem(result)}")
            lines += [f"  - warning: {warning}" for warning in result.get("warnings", ())]
        reports = {name: result["report"] for name, result in there.items() if "report" in result}
        try:
            shown = make(reports, results) if reports else "Not measured."
        except Exception as error:  # a report that lacks something, and is not to cost the other tables
            shown = f"Not shown: {type(error).__name__}: {error}"
        sections.append("\n".join([*lines, "", shown]))
    return "\n\n".join(sections) + "\n"


def heading(results: Results) -> str:
    machines = [result["report"]["machine"] for result in results.values() if "report" in result]
    about = ", ".join(f"{name} {value}" for name, value in machines[0].items()) if machines else "not known"
    title = (
        "Measured on a GPU" if any("gpu" in machine for machine in machines) else "No GPU: a test of the tool"
    )
    return f"# {title}\n\nMachine: {about}."


def problem(result: Mapping[str, Any]) -> str:
    return f": **{result['error']}**" if "error" in result else ""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """
    >>> print(table(["slots", "tokens/s"], [[2, "3.1"]]))
    | slots | tokens/s |
    |---|---|
    | 2 | 3.1 |
    """
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def number(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}"


def megabytes(value: float) -> str:
    return number(value / 1e6)


def percent(value: float) -> str:
    return f"{value:.1%}"


def met(value: float, aim: float) -> str:
    """
    >>> met(0.91, 0.9), met(0.5, 0.9)
    ('0.91', '0.50 (missed)')
    """
    return f"{value:.2f}" + ("" if value >= aim else " (missed)")


def link_table(reports: Mapping[str, Any], results: Results) -> str:
    report = reports["link"]
    kinds = report["link"]
    rows = [
        [format_bytes(int(row[0]["bytes"])), *(number(r["bytes_per_s"] / 1e9, 2) for r in row)]
        for row in zip(*kinds.values(), strict=True)
    ]
    memory = f"Memory of the device: {number(report['memory']['bytes_per_s'] / 1e9)} GB/s."
    return table(["GB/s, copies of", *kinds], rows) + f"\n\n{memory}"


def decode_table(reports: Mapping[str, Any], results: Results) -> str:
    rows = []
    for report in reports.values():
        memory, rate = report["memory"], report["decode"]["tokens_per_s"]
        rows.append([
            report["model"], number(memory["weight_bytes_per_token"] / 1e9, 2),
            number(memory["bandwidth_bytes_per_s"] / 1e9), number(memory["bound_tokens_per_s"]),
            number(rate) + ("" if rate >= 150 else " (missed)"), met(memory["decode_share_of_bound"], 0.5),
        ])  # fmt: skip
    return table(["model", "GB/token", "memory, GB/s", "bound, tokens/s", "tokens/s", "of the bound"], rows)


def offload_table(reports: Mapping[str, Any], results: Results) -> str:
    report, rows = reports["offload"], []
    for row in report.get("rows", [report]):
        if "error" in row:
            rows.append([row["routing"], row["slots"], row["error"], *[""] * 8])
            continue
        full = row["modes"]["full"]
        rows.append([
            row["routing"], slots(row), percent(full["hit_ratio"]), megabytes(full["missed_bytes_per_token"]),
            number(row["computing_ms_per_token"], 2), number(row["copying_ms_per_token"], 2),
            number(row["bound_tokens_per_s"], 2), number(row["tokens_per_s"]["full"], 2),
            met(row["share_of_bound"]["full"], 0.9), number(full["stall_ms_per_token"], 2),
            f"{percent(full['lookahead_recall'])} / {percent(full['wasted_share_of_bytes'])}",
        ])  # fmt: skip
    header = [
        "routing", "slots", "hits", "missed MB/token", "computing, ms", "copying, ms", "bound, tokens/s",
        "tokens/s", "of the bound", "stall, ms", "recall / bytes wasted",
    ]  # fmt: skip
    return f"{described(report)}\n\n{table(header, rows)}"


def slots(row: Mapping[str, Any]) -> str:
    """
    >>> slots({"slots": [3, 3]}), slots({"slots": [4, 3]}), slots({"resident": True})
    ('3', '3 to 4', 'all')
    """
    if "slots" not in row:
        return "all"
    least, most = min(row["slots"]), max(row["slots"])
    return str(least) if least == most else f"{least} to {most}"


def described(report: Mapping[str, Any]) -> str:
    return (
        f"{report['model']}; link {number(report['link_bytes_per_s'] / 1e9)} GB/s; "
        f"host memory: {report['host_memory']}."
    )


def ladder_table(reports: Mapping[str, Any], results: Results) -> str:
    report = reports["ladder"]
    rows = []
    for mode, rate in report["tokens_per_s"].items():
        shown = ["", "0", ""]
        if (figures := report["modes"].get(mode)) is not None:
            copied, stall = figures["copied_bytes_per_token"], figures["stall_ms_per_token"]
            shown = [number(report["share_of_bound"][mode], 2), megabytes(copied), number(stall, 2)]
        rows.append([mode, number(rate, 2), *shown])
    title = f"{described(report)} {slots(report)} slots, {report['routing']} routing."
    header = ["", "tokens/s", "of the bound", "copied MB/token", "stall, ms"]
    return f"{title}\n\n{table(header, rows)}"


def prefill_table(reports: Mapping[str, Any], results: Results) -> str:
    report = reports["prefill"]
    prompt, least = report["prompt"], report["bound"]
    row = [
        slots(report), prompt["tokens"], report["chunk"], number(report["missing_experts_per_layer"], 2),
        number(report["missed_bytes"] / 1e9, 2), number(least["copying_ms"]), number(least["computing_ms"]),
        number(prompt["tokens"] / prompt["tokens_per_s"] * 1e3), number(prompt["tokens_per_s"]),
        met(least["share_of_bound"], 0.8),
    ]  # fmt: skip
    header = [
        "slots", "tokens", "chunk", "missing per layer", "missed GB", "copying, ms", "computing, ms",
        "took, ms", "tokens/s", "of the bound",
    ]  # fmt: skip
    again = [
        [first["tokens"], first["thread"], number(first["first_ms"]), number(first["again_ms"])]
        for first in report["first_times"]
    ]
    times = table(["tokens", "thread", "first time, ms", "second, ms"], again)
    return f"{described(report)}\n\n{table(header, [row])}\n\nOther lengths, computing alone:\n\n{times}"


def memory_table(reports: Mapping[str, Any], results: Results) -> str:
    rows = []
    for name, report in reports.items():
        memory, limit = report["device_memory"], name.removeprefix("memory-")
        names = ("planned_bytes", "peak_reserved_bytes", "outside_pytorch_bytes")
        sizes = [format_bytes(memory[name]) for name in names]
        over, rate = memory["peak_over_plan"] - 1, report["decode"]["tokens_per_s"]
        most = memory["peak_reserved_bytes"] + memory["outside_pytorch_bytes"]
        failed = " (above --vram)" if most > parse_bytes(limit) else " (missed)" if abs(over) > 0.03 else ""
        shown = f"{over:+.1%}{failed}"
        rows.append([limit, slots(report), *sizes, shown, number(rate, 2)])
    header = ["--vram", "slots", "planned", "peak of PyTorch", "outside it", "both, to the plan", "tokens/s"]
    return table(header, rows)


def naive_table(reports: Mapping[str, Any], results: Results) -> str:
    report = reports["naive"]
    limited = next(
        (r["report"] for name, r in results.items() if name == "memory-12GiB" and "report" in r), None
    )
    ours = limited["decode"]["tokens_per_s"] if limited else None
    rows = [["Transformers and accelerate", number(report["tokens_per_s"], 3),
             number(report["bytes_moved_per_token"] / 1e9, 2), ""]]  # fmt: skip
    if limited and ours and "experts" in limited:  # not where all of a small shape fit
        moved = limited["experts"]["copied_bytes_per_token"] / 1e9
        rows.append(
            ["this, 4 bits", number(ours, 3), number(moved, 2), met(ours / report["tokens_per_s"], 10)]
        )
    return (
        table(["12 GiB", "tokens/s", "GB moved per token", "times as fast"], rows)
        + f"\n\n{report['placement']}. cuDNN's attention is {'on' if report['cudnn_attention'] else 'off'}."
    )


Make = Callable[[Mapping[str, Any], Results], str]
SECTIONS: tuple[tuple[str, str, tuple[str, ...], Make], ...] = (
    ("The link", "", ("link",), link_table),
    ("All experts resident", "half of the bound, and 150 tokens/s", ("decode",), decode_table),
    ("Few slots", "0.9 of the bound", ("offload",), offload_table),
    ("What each part is worth", "", ("ladder",), ladder_table),
    ("A long prompt", "0.8 of the bound", ("prefill",), prefill_table),
    ("Peak memory", "within 3 % of the plan, and never above --vram", ("memory",), memory_table),
    ("Transformers with accelerate", "10 times as fast", ("naive",), naive_table),
)
