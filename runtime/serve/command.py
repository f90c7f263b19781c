"""Serve a model over HTTP, with OpenAI's API and a page to talk to it.

    python -m runtime.serve --model path/to/Mixtral-8x7B-Instruct --parallel 4
    python -m runtime.serve --host 0.0.0.0 --api-key-file keys.txt

Without --model, this serves the small demo model that comes with the package. SIGTERM and Ctrl-C end it after
the answers that are being written, within --grace seconds.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import OptionError
from runtime.options import EngineOptions
from runtime.shell.arguments import MODEL_HELP, add_flags, from_flags, group, new_parser
from runtime.shell.command import run
from runtime.shell.progress import byte_bar, download_bar, kernel_bar
from runtime.shell.ranks import end_when_lost, ending_together, follow, say_loaded

if TYPE_CHECKING:
    pass

NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")
GRACE = 30.0  # seconds
QUEUE = 64


def main(argv: list[str] | None = None) -> int:
    return run(lambda: serve(argv))


def serve(argv: list[str] | None) -> None:
    """Do what the command line asks. Every failure raises, and `run` makes a line and a status of it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        options = from_flags(EngineOptions, args)
    except OptionError as error:
        parser.error(str(error))
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise OptionError(f"serving needs {', '.join(missing)}; pip install 'mixtral-runtime[serve]'")
    with ending_together(options) as rank:
        if rank:
            follow(args.model, options)
        else:
            serve_requests(args, options)


def serve_requests(args: argparse.Namespace, options: EngineOptions) -> None:
    from runtime.engine import Engine
    from runtime.serve.address import bind, check_exposed
    from runtime.serve.guard import Keys
    from runtime.serve.running import Setting, keep_serving

    keys = Keys.read(args.api_key_file) if args.api_key_file else None
    with bind(args.host, args.port) as listening:
        check_exposed(listening, keys is not None)
        bars = (None, None, None) if args.quiet else (byte_bar, kernel_bar, download_bar)
        loading, compiling, downloading = bars
        with Engine.load(args.model, options, loading, compiling, None, downloading) as engine:
            end_when_lost(engine)
            if not args.quiet:
                say_loaded(engine)
            setting = Setting(named(args), keys, args.origin, args.queue, args.grace, args.quiet)
            keep_serving(engine, listening, setting)


def named(args: argparse.Namespace) -> list[str]:
    """The names of the model, its own first."""
    own = "demo" if args.model is None else str(args.model)
    folder = Path(own)
    return [*args.name, folder.resolve().name if folder.exists() else own]


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("runtime.serve", __doc__)
    model = group(parser, "model and prompt")
    model.title = "model"
    model.add_argument("--model", metavar="MODEL", help=f"{MODEL_HELP} (default: the demo model)")
    model.add_argument(
        "--name", action="extend", nargs="+", default=[], metavar="NAME",
        help="what clients may call the model, besides the name of its folder; answers say the first",
    )  # fmt: skip
    add_flags(parser, EngineOptions)
    server = group(parser, "server")
    server.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)"
    )
    server.add_argument(
        "--port", type=port, default=8080, metavar="N", help="0 takes a free one (default: %(default)s)"
    )
    server.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="let clients in by a key, one of this file's lines",
    )
    server.add_argument(
        "--origin", action="extend", nargs="+", default=[], metavar="URL",
        help="let pages from this origin ask, as http://localhost:3000 (default: only the server's own page)",
    )  # fmt: skip
    server.add_argument(
        "--queue", type=at_least_zero, default=QUEUE, metavar="N",
        help="requests that may wait for a place; more are refused with status 429 (default: %(default)s)",
    )  # fmt: skip
    server.add_argument(
        "--grace", type=seconds, default=GRACE, metavar="SECONDS",
        help="how long answers may go on when the server is told to stop (default: %(default)s)",
    )  # fmt: skip
    output = group(parser, "output")
    output.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    return parser


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}, and must be a number from 0 to 65535")
    return int(text)


def at_least_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, and must be a number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}, and must be a number of seconds, from 0 to 86400")
    return found
