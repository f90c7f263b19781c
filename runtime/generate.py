"""Generate text from the shell.

    python -m runtime.generate --prompt "def fibonacci("
    python -m runtime.generate --model path/to/Mixtral-8x7B-Instruct --chat

Generated text goes to stdout; progress, plan and statistics go to stderr. Without --model it is the small
demo model that comes with the package; without a prompt, stdin is read (with --chat on a terminal: turn by
turn).
"""

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

import torch

from model.checkpoint import open_checkpoint
from model.errors import ModelError
from runtime.arguments import add_flags, from_flags
from runtime.engine import DEMO, Engine
from runtime.errors import LoadError, MixtralError, OptionError, RequestError
from runtime.options import EngineOptions, SamplingParams
from runtime.progress import byte_bar
from runtime.session import Session, Token
from runtime.setup import make_plan

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed by whoever started this process
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.system is not None and not args.chat:
        parser.error("--system is for conversations; add --chat")
    try:
        options, params = from_flags(EngineOptions, args), from_flags(SamplingParams, args)
    except OptionError as error:
        parser.error(str(error))
    try:
        with one_line_warnings():
            run(args, options, params)
    except (MixtralError, OSError) as error:
        drop_unwritable()
        if isinstance(error, BrokenPipeError):  # whoever reads has had enough
            return DONE
        reason = str(error)
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        print(f"error: {reason}", file=sys.stderr)
        return USAGE if isinstance(error, OptionError) else FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint folder (default: the demo model)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to continue, or with --chat to answer")
    source.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="the same from a file (default: stdin)"
    )
    parser.add_argument("--chat", action="store_true", help="hold a conversation, in the model's chat format")
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    add_flags(parser, SamplingParams)
    add_flags(parser, EngineOptions)
    parser.add_argument("--dry-run", action="store_true", help="say what memory it would take, and stop")
    parser.add_argument(
        "--stats", choices=("text", "json"), help="form of the statistics at the end (default: text)"
    )
    parser.add_argument(
        "--stats-file", type=Path, metavar="FILE", help="write the statistics there too, as JSON"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write what becomes of experts there (see tools.trace)"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no plan, progress or statistics, only warnings and errors"
    )
    return parser


def run(args: argparse.Namespace, options: EngineOptions, params: SamplingParams) -> None:
    """Do what the command line asks. Everything that can go wrong is raised."""
    if args.dry_run:
        try:
            checkpoint = open_checkpoint(args.model or DEMO)
        except ModelError as error:
            raise LoadError(str(error)) from error
        setup = make_plan(checkpoint, options)
        where = f"in {dtype_name(setup.dtype)} on {setup.device}"
        print(f"{checkpoint.description}, {where}: {setup.plan}", file=sys.stderr)
        return
    by_turns = args.chat and args.prompt is None and args.prompt_file is None and sys.stdin.isatty()
    prompt = "" if by_turns else read_prompt(args.prompt, args.prompt_file)
    with Engine.load(args.model, options, progress=None if args.quiet else byte_bar) as engine:
        if not args.quiet:
            print(f"{dtype_name(engine.dtype)} on {engine.device}: {engine.plan}", file=sys.stderr)
        with engine.recording(args.trace) if args.trace else nullcontext():
            if by_turns:
                converse(engine.session(args.system), params)
            elif args.chat:
                session = engine.session(args.system)
                session.send(prompt)
                show(session.generate(params), engine)
            else:
                show(engine.generate(prompt, params), engine)
        report(engine, args)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show warnings, ours and others', as `warning: ...`, without the line of code that they come from."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def converse(session: Session, params: SamplingParams) -> None:
    """Turn by turn on a terminal, until end of file. A turn that fails says why, and the next may succeed."""
    print("Write a message and press Enter; Ctrl-D ends.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            print(file=sys.stderr)
            return
        if not line.strip():
            continue
        try:
            session.send(decode(line, "the message"))
            show(session.generate(params), session.engine)
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr)


def show(tokens: Iterator[Token], engine: Engine) -> None:
    """Write tokens to stdout as they come."""
    finish = None
    for token in tokens:
        sys.stdout.buffer.write(token.text.encode())
        sys.stdout.buffer.flush()
        finish = token.finish
    if sys.stdout.isatty():
        print(flush=True)
    if finish == "context":
        print(
            f"warning: stopped early, the context of {engine.plan.context} tokens is full"
            + engine.more_context("; "),
            file=sys.stderr,
        )


def drop_unwritable() -> None:
    """If stdout takes no more, point it to where its last flush, at exit, does not fail once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt, from wherever it is to come. Of a file or stdin one newline at the very end is dropped: it
    is the editor's or the shell's, and a model would take it for the end of a line."""
    if text is not None:
        return text
    source = str(file) if file else "stdin"
    if not file and sys.stdin.isatty():
        print("Write the text to continue; Ctrl-D on a new line ends it.", file=sys.stderr)
    data = file.read_bytes() if file else sys.stdin.buffer.read()
    if not data:
        raise RequestError(f"{source} is empty; give a prompt (--prompt '' lets the model begin by itself)")
    return decode(data, source)


def decode(data: bytes, source: str) -> str:
    """Text that was typed or piped in, less one newline at the end."""
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error


def report(engine: Engine, args: argparse.Namespace) -> None:
    """Statistics to stderr as asked, and to a file if one was named."""
    stats = engine.stats()
    rates = {"prompt_tokens_per_s": stats.prompt_rate, "decode_tokens_per_s": stats.decode_rate}
    rates |= {"hit_ratio": stats.hit_ratio, "lookahead_recall": stats.recall}
    as_json = json.dumps(dataclasses.asdict(stats) | rates | {"plan": dataclasses.asdict(engine.plan)})
    if args.stats == "json":
        print(as_json, file=sys.stderr)
    elif args.stats == "text" or not args.quiet:
        print(stats, file=sys.stderr)
    if args.stats_file:
        args.stats_file.write_text(as_json + "\n")


if __name__ == "__main__":
    sys.exit(main())
