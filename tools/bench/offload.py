"""What each part of the expert cache is worth: decoding with all of it, and with less and less.

    full            LRU slots, and guessed experts are copied early
    no prefetch     LRU slots
    no cache        nothing is kept: a token's experts are copied in every layer
    whole layers    all experts of a layer are copied before it is computed, as device maps do

The modes take turns over the same model, slots and ids. Beside them stands the bound: a token takes no less
than computing alone, and no less than the cache's missed bytes take on the link.

On a CPU, the link is by default as fast as makes these two equal, where overlap is worth most, and one core
is left to it.
"""

import argparse
from typing import Any

from runtime.errors import OptionError
from runtime.experts.link import HostLink
from runtime.process.threads import pick_threads, using_threads
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from runtime.stats import Stats
from tools.bench.figures import Turn, bound, device_memory, median_seconds, traffic
from tools.bench.stage import Stage, random_ids, staged
from tools.bench.subject import add_arguments as add_subject
from tools.bench.ways import FORGETFUL, LADDER

SLOTS = 4
WARM_UP = 16  # tokens before the first that counts, so that slots hold what they hold in a long text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument(
        "--steadiness",
        type=float,
        default=8.0,
        help="how slowly the random model's residual stream changes: its first value, in units of what a "
        "layer adds. Lookahead depends on it (default: 8)",
    )
    parser.add_argument(
        "--modes", type=modes, default=LADDER, metavar="NAME,..", help="some of the above (default: all)"
    )
    parser.add_argument("--tokens", type=at_least_one, default=32, help="per turn (default: 32)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="turns of each mode (default: 5)")


def modes(text: str) -> tuple[str, ...]:
    """
    >>> modes("no prefetch,full")
    ('no prefetch', 'full')
    """
    for name in text.split(","):
        if name not in LADDER:
            raise argparse.ArgumentTypeError(f"{name!r}, and must be of {', '.join(LADDER)}")
    return tuple(text.split(","))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per turn on stderr. Returns all figures."""
    defaults: dict[str, Any] = {"offload": "always"}
    if getattr(args, "vram", None) is None:
        defaults["slots"] = SLOTS
    threads = getattr(args, "threads", None) or max(pick_threads() - 1, 1)  # one copies
    names = ("computing", *args.modes)
    with using_threads(threads), staged(args, args.tokens + WARM_UP, names, **defaults) as stage:
        subject = stage.subject
        if subject.store is None:
            raise OptionError("all experts are resident; leave out --offload never")
        if args.shape:
            subject.model.embed_tokens.weight.mul_(args.steadiness * subject.config.hidden**0.5)
        return subject.describe() | measure(stage, args.tokens, args.repeats)


def measure(stage: Stage, tokens: int, repeats: int) -> dict[str, Any]:
    """All modes in turn, `repeats` times."""
    subject, plan, cache = stage.subject, stage.subject.plan, stage.cache
    assert cache is not None
    length = tokens + WARM_UP
    texts = [ids.tolist() for ids in random_ids(subject.config, length * repeats)[0].split(length)]

    def turn(way: str, repeat: int) -> Turn:
        text = texts[repeat]
        # Where nothing is kept, one token leaves what sixteen would, and takes long enough.
        warm_up = text[WARM_UP - 1 if way in FORGETFUL else 0 : WARM_UP]
        return stage.play(way, lambda p: p.decode(warm_up), lambda p: p.decode(text[WARM_UP:]))[1]

    first = turn(list(stage.ways)[1], 0)
    memory = device_memory(plan)  # before there is more than an engine has
    for way in stage.ways:
        stage.use(way).decode(texts[0][:2])  # graphs are captured
    link = subject.link
    if plan.device.type == "cpu":
        if not subject.options.link_gbps and first.counted.misses:
            alone = median_seconds([turn("computing", 0) for _ in range(3)])
            link = first.counted.misses * plan.blob_bytes / alone
        cache.copies.link = HostLink(link)  # it is idle now
    turns: dict[str, list[Turn]] = {way: [] for way in stage.ways}
    for repeat in range(repeats):
        for way, taken in turns.items():
            taken.append(turn(way, repeat))
        shown = ", ".join(f"{way} {tokens / taken[-1].seconds:.2f}" for way, taken in turns.items())
        say(f"{repeat + 1} of {repeats}: {shown} tokens/s")
    about = {"slots": list(plan.slots_per_layer), "link_gb_per_s": link / 1e9, "graphs": stage.graphs()}
    return about | report(turns, link, plan.blob_bytes, tokens) | memory


def report(turns: dict[str, list[Turn]], link: float, blob: int, tokens: int) -> dict[str, Any]:
    """The bound, and a row for each mode: its median speed, and what became of experts in all its turns.

    Guesses change no misses, so those of a mode that keeps experts set the bound.
    """
    seconds = {way: median_seconds(taken) / tokens for way, taken in turns.items()}
    figures = {
        way: traffic(sum((t.counted for t in taken), Stats()), len(taken) * tokens, blob)
        for way, taken in turns.items()
    }
    missed = [figures[way]["missed_bytes_per_token"] for way in ("full", "no prefetch") if way in turns]
    least = bound(missed[0] if missed else 0.0, link, seconds["computing"])
    rows = [
        {"mode": way, "tokens_per_s": 1 / taken, "share_of_bound": least["bound_ms"] / (taken * 1e3)}
        | figures[way]
        for way, taken in seconds.items()
    ]
    return least | {"bound_tokens_per_s": 1e3 / least["bound_ms"], "modes": rows}
