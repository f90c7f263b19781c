"""Generate text from the shell.

    python -m runtime.generate --prompt "def read_bytes(obj):" --temperature 0.3
    python -m runtime.generate --model path/to/Mixtral-8x7B-Instruct --chat

Without --model, this runs the small demo model that comes with the package. Without a prompt, it reads one
from stdin. With --chat on a terminal, it reads message after message. Generated text goes to stdout.
Progress, plan and statistics go to stderr.
"""

from __future__ import annotations

from runtime.shell.command import launch, run, say

if __name__ == "__main__":
    launch("runtime.generate")

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from runtime.errors import OptionError
from runtime.options import EngineOptions, SamplingParams
from runtime.requests import check_bias, check_room
from runtime.shell.arguments import MODEL_HELP, add_flags, from_flags, group, new_parser
from runtime.shell.aside import check_writable, written_aside
from runtime.shell.conversation import Conversation, show
from runtime.shell.progress import byte_bar, download_bar, kernel_bar
from runtime.shell.prompts import read_prompt
from runtime.shell.ranks import end_when_lost, ending_together, follow, say_loaded, say_rank_plans
from runtime.shell.reading import MessageReader
from runtime.shell.talk import talk

if TYPE_CHECKING:
    from model.config import ModelConfig
    from runtime.engine import Engine
    from runtime.planning.plan import Plan
    from tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    return run(lambda: generate(argv))


def generate(argv: list[str] | None) -> None:
    """Do what the command line asks. Every failure raises, and `run` makes a line and a status of it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("system", "session"):
        if getattr(args, name) is not None and not args.chat:
            parser.error(f"--{name} is for conversations; add --chat")
    try:
        options, params = from_flags(EngineOptions, args), from_flags(SamplingParams, args)
    except OptionError as error:
        parser.error(str(error))
    with ending_together(options) as rank:
        if args.dry_run:
            say_plan(args.model, options)
        elif rank:
            follow(args.model, options)
        else:
            serve(args, options, params)


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("runtime.generate", __doc__)
    prompt = group(parser, "model and prompt")
    prompt.add_argument("--model", metavar="MODEL", help=f"{MODEL_HELP} (default: the demo model)")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to continue, or with --chat to answer")
    source.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file (default: stdin)"
    )
    prompt.add_argument("--chat", action="store_true", help="hold a conversation, in the model's chat format")
    prompt.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    prompt.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="go on with the conversation in a file, and keep it there",
    )
    add_flags(parser, SamplingParams, EngineOptions)
    output = group(parser, "output")
    output.add_argument("--dry-run", action="store_true", help="print the memory it would take, and stop")
    output.add_argument(
        "--stats", choices=("text", "json"), help="form of the statistics at the end (default: text)"
    )
    output.add_argument(
        "--stats-file", type=Path, metavar="FILE", help="write the statistics to a file too, as JSON"
    )
    output.add_argument(
        "--trace", type=Path, metavar="FILE", help="write what becomes of experts to a file (see tools.trace)"
    )
    output.add_argument(
        "--quiet", action="store_true", help="print no plan, progress or statistics, only warnings and errors"
    )
    return parser


def say_plan(model: str | None, options: EngineOptions) -> None:
    """Print the memory that an engine would take. This reads no weights."""
    from runtime.engine import DEMO
    from runtime.hub.opening import open_headers
    from runtime.planning.planner import plan_checkpoint

    if options.distributed:
        say_rank_plans(model or DEMO, options)
        return
    checkpoint = open_headers(model or DEMO)
    plan = plan_checkpoint(checkpoint, options)
    for line in f"{checkpoint.description}, in {plan.where}: {plan}".splitlines():
        say(line)


def serve(args: argparse.Namespace, options: EngineOptions, params: SamplingParams) -> None:
    """Load the model, continue the prompt or hold a conversation, and report."""
    from runtime.engine import Engine

    by_turns = args.chat and args.prompt is None and args.prompt_file is None and sys.stdin.isatty()
    prompt = None if by_turns else read_prompt(args.prompt, args.prompt_file)
    bars = (None, None, None) if args.quiet else (byte_bar, kernel_bar, download_bar)
    loading, compiling, downloading = bars
    for path in filter(None, (args.trace, args.session)):
        check_writable(path)
    with (
        written_aside(args.stats_file) if args.stats_file else nullcontext() as stats_file,
        Engine.load(
            args.model, options, loading, compiling, partial(judge, args, params, prompt), downloading
        ) as engine,
    ):
        end_when_lost(engine)
        if not args.quiet:
            say_loaded(engine)
        with engine.recording(args.trace) if args.trace else nullcontext():
            if prompt is None:
                talk(Conversation(engine, params, args.system, args.session), MessageReader())
            elif args.chat:
                conversation = Conversation(engine, params, args.system, args.session)
                conversation.answer(prompt)
                conversation.keep()
            else:
                show(engine.generate(prompt, params), engine)
        report(engine, args, stats_file)


def judge(
    args: argparse.Namespace,
    params: SamplingParams,
    prompt: str | None,
    tokenizer: Tokenizer,
    plan: Plan,
    config: ModelConfig,
) -> None:
    """Check a request before the engine reads weights. A `prompt` of None means that messages will follow.

    Raises `OptionError`, `RequestError` or `TokenizerError` if the request cannot be served.
    """
    from runtime.constraint import Constraints
    from runtime.engine import NOTHING_TO_TRACE

    if args.trace and plan.resident:
        raise OptionError(NOTHING_TO_TRACE)
    check_bias(params.logit_bias, config.vocab)
    Constraints(config.vocab).make(params, tokenizer.stream(), tokenizer.ends)
    if prompt is None:
        return
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    check_room(len(ids), plan.context, config.context)


def report(engine: Engine, args: argparse.Namespace, file: TextIO | None) -> None:
    """Print statistics to stderr, in the form that the flags ask for, and to `file` if there is one."""
    stats = engine.stats()
    rates = {"prompt_tokens_per_s": stats.prompt_rate, "decode_tokens_per_s": stats.decode_rate}
    rates |= {"hit_ratio": stats.hit_ratio, "lookahead_recall": stats.recall}
    as_json = json.dumps(dataclasses.asdict(stats) | rates | {"plan": engine.plan.as_dict()})
    if args.stats == "json":
        say(as_json)
    elif args.stats == "text" or not args.quiet:
        print(stats, file=sys.stderr)
    if file:
        file.write(as_json + "\n")
