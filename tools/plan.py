"""What a model would take of a device's memory, before there is a model or a device.

    python -m tools.plan --shape mixtral-8x7b --attention 4 --experts 2 --vram 8GiB,11GiB,24GiB
    python -m tools.plan path/to/checkpoint --vram 11GiB,24GiB --ram 16GiB,32GiB --context 8192

Of a checkpoint only headers are read. With --attention, --experts or --head it is planned as if it were
quantized so. The device is a CUDA card of --capability with --vram of memory, and need not be there. What
PyTorch takes beside tensors is counted as on the card where that is most. With --device cpu everything is in
--ram, in the form that this machine's CPU computes with.

Experts have three tiers: slots in --vram, berths in --ram, and the checkpoint's files for those that find no
berth. Nothing is measured, so what a miss takes is arithmetic, with the usual rates of links and disks or the
rates that you give.

Several sizes give a table. If both --vram and --ram have several, the first goes with the first, and so on.
For a size that is too small, the reason takes the place of the column. If every size is too small, the exit
status is 1.

    python -m tools.plan --shape mixtral-8x22b --attention 4 --experts 3g128 --ranks 24GiB,24GiB,cpu:64GiB

With --ranks, several devices share one model, as torchrun starts them with --distributed (docs/ranks.md).
Each size is a rank's device memory, or with cpu: before it the memory of a rank that computes on its CPU.
--ram is then the host memory of ranks with a card. Each rank is a column.
"""

from runtime.shell.command import DONE, FAILED, launch, put, run, say

if __name__ == "__main__":
    launch("tools.plan")

import argparse
import dataclasses
import json
import re

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.part import Part
from model.quant.formats import KINDS, PLAIN, Formats
from model.quant.spec import QuantSpec
from model.shapes import SHAPES
from model.target import Target
from runtime.errors import DeviceError, OptionError
from runtime.hub.opening import open_headers
from runtime.options import EngineOptions, check_size
from runtime.planning.offer import Offer
from runtime.planning.planner import make_plan
from runtime.planning.rank_plans import RankPlans
from runtime.planning.request import Budgets, Request
from runtime.planning.sharing import JointRequest, share_layers
from runtime.shell.arguments import MODEL_HELP, add_flag, from_flags, new_parser
from tools.sheet import Column, Sheet, as_json, as_text

ENGINE_FLAGS = (
    "dtype", "map", "context", "kv", "offload", "slots", "berths", "lookahead", "prefetch",
    "link_gbps", "disk_gbps", "rank_layers",
)  # fmt: skip


def make_sheet(args: argparse.Namespace) -> Sheet:
    """Plan the model for each size. A size that is too small gives a column without a plan.

    Raises `ModelError` if the checkpoint cannot be used, and `OptionError` if an option makes no sense.
    """
    model, files = describe_model(args)
    on_cpu = args.device == "cpu"
    target = Target.of(torch.device("cpu")) if on_cpu else Target.hypothetical(args.capability)
    requests = []
    for label, sizes in make_sizes(args):
        options = from_flags(EngineOptions, argparse.Namespace(**vars(args) | sizes))
        requests.append((label, make_request(model, files, options, target)))
    return Sheet(args.shape or args.model, [make_column(*column) for column in requests])


def make_rank_sheet(args: argparse.Namespace) -> Sheet:
    """Plan the model for ranks together. Raises as `make_sheet` does, and `DeviceError` if they have not
    enough memory."""
    (config, formats), files = describe_model(args)
    options = from_flags(EngineOptions, argparse.Namespace(**vars(args) | {"vram": None, "ram": None}))
    offers = make_offers(args)
    try:
        shares = share_layers(config, formats, options, offers, files)
    except ModelError as error:  # a format that does not divide this model's matrices
        raise OptionError(str(error)) from error
    asked = JointRequest(config, formats, options, offers, files)
    requests = [asked.request(rank, layers) for rank, layers in enumerate(shares)]
    labels = [f"rank {rank}: {size.strip()}" for rank, size in enumerate(args.ranks.split(","))]
    columns = [
        Column(label, request, make_plan(request)) for label, request in zip(labels, requests, strict=True)
    ]
    plans = [column.plan for column in columns if column.plan]
    hosts = [offer.host for offer in offers]
    return Sheet(
        args.shape or args.model, columns, RankPlans(Part.split(config, shares), plans, hosts, config.hidden)
    )


def make_offers(args: argparse.Namespace) -> tuple[Offer, ...]:
    """What each rank has, from --ranks and --ram.

    Raises `OptionError` if there are several sizes of --ram, but not one for each rank, or if a flag
    contradicts --ranks.
    """
    sizes, rams = args.ranks.split(","), [None] if args.ram is None else args.ram.split(",")
    if args.vram is not None or args.device == "cpu":
        given = f"device is {args.device}" if args.vram is None else f"vram is {args.vram}"
        raise OptionError(
            f"{given}, and ranks is {args.ranks}; write all ranks in --ranks, as 11GiB,cpu:32GiB"
        )
    if len(rams) not in (1, len(sizes)):
        raise OptionError(f"ram is {args.ram}; give one size, or one for each of {len(sizes)} ranks")
    offers = []
    for rank, (size, ram) in enumerate(zip(sizes, rams * (len(sizes) // len(rams)), strict=True)):
        kind, colon, own = size.strip().partition(":")
        on_cpu = kind == "cpu"
        target = Target.of(torch.device("cpu")) if on_cpu else Target.hypothetical(args.capability)
        vram, ram = (None, own or ram) if on_cpu else (size.strip(), ram)
        for name, text in (("ranks", own if on_cpu and colon else vram), ("ram", ram)):
            if text is not None:
                check_size(name, text.strip())
        offers.append(Offer.given(target, vram, ram and ram.strip(), f"machine {rank}"))
    return tuple(offers)


def make_sizes(args: argparse.Namespace) -> list[tuple[str, dict[str, str | None]]]:
    """Each column's label and sizes. A single size of one memory goes with all of the other's.

    Raises `OptionError` if both memories have several sizes, and not as many.
    """
    given = {name: getattr(args, name) for name in ("vram", "ram")}
    sizes = {name: [None] if text is None else text.split(",") for name, text in given.items()}
    count = max(map(len, sizes.values()))
    for name, few in sizes.items():
        if len(few) not in (1, count):
            raise OptionError(f"{name} is {given[name]}; give one size, or one for each of {count} columns")
    columns = []
    for vram, ram in zip(*(few * (count // len(few)) for few in sizes.values()), strict=True):
        label = ram if args.device == "cpu" else vram
        label = "no limit" if label is None else label.strip()
        if args.device == "cuda" and len(sizes["ram"]) > 1:
            label += f" + {ram.strip()}"
        columns.append((label, {"vram": vram, "ram": ram}))
    return columns


def describe_model(args: argparse.Namespace) -> tuple[tuple[ModelConfig, Formats], torch.dtype | None]:
    """The configuration and the formats of the weights, and what `Checkpoint.mappable` would be."""
    given = {kind: getattr(args, kind) for kind in KINDS}
    try:
        asked = {kind: QuantSpec.parse(text) for kind, text in given.items() if text is not None}
    except ModelError as error:
        raise OptionError(str(error)) from error
    checkpoint = None if args.shape else open_headers(args.model)
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


def make_column(label: str, request: Request) -> Column:
    try:
        return Column(label, request, make_plan(request))
    except DeviceError as error:
        return Column(label, request, None, str(error))


def capability(text: str) -> tuple[int, int]:
    """Parse a compute capability.

    >>> capability("7.5")
    (7, 5)
    """
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}, and must be like 7.5")
    return int(match[1]), int(match[2])


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("tools.plan", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
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
    parser.add_argument(
        "--ram", metavar="SIZE[,SIZE...]", help="host memory to use at most (default: no limit)"
    )
    parser.add_argument(
        "--ranks",
        metavar="SIZE[,SIZE...]",
        help="plan for several devices together: device memory of each rank, or cpu:SIZE",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument(
        "--capability", type=capability, default="8.0", metavar="X.Y", help="of the card (default: 8.0)"
    )
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
    args.distributed = args.ranks is not None  # which --rank-layers needs
    if not args.distributed and hasattr(args, "rank_layers"):
        raise OptionError(f"rank_layers is {args.rank_layers}, and there are no ranks; add --ranks")
    sheet = make_rank_sheet(args) if args.distributed else make_sheet(args)
    if args.json:
        put(json.dumps(as_json(sheet), indent=2) + "\n")
    elif sheet.plans:
        put(as_text(sheet, args.markdown) + "\n")
    if sheet.plans:
        return DONE
    for column in sheet.columns:
        say(f"error: {column.label}: {column.reason}")
    return FAILED
