"""How well a model predicts a text: perplexity per token, and bits per byte of the text.

    python -m tools.perplexity MODEL --text FILE [FILE ...]

Each file is one text after a begin-of-sequence id, and is tokenized as a whole. A window of tokens slides
over it by --stride. Each token is predicted once, from those before it in the first window that reaches it.
The result depends only on the text, --window and --stride. Within a window the tokens go through the model in
chunks, whose size limits the memory and changes the result by no more than rounding. Results go to stdout,
progress and errors to stderr.
"""

from runtime.shell.command import launch, put, run

if __name__ == "__main__":
    launch("tools.perplexity")

import argparse
import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from model.checkpoint import open_checkpoint
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime.engine import DEMO, Engine
from runtime.errors import OptionError, RequestError
from runtime.hub.opening import find_folder
from runtime.options import EngineOptions
from runtime.passes import Here, Pass, Passes
from runtime.planning.plan import PREFILL_CHUNK
from runtime.shell.arguments import MODEL_HELP, add_flags, from_flags, new_parser
from runtime.shell.progress import byte_bar, download_bar, kernel_bar, progress
from runtime.shell.ranks import end_when_lost, ending_together, follow
from tools.windows import Piece, pieces


@dataclasses.dataclass(frozen=True)
class Score:
    """What it cost to predict some text. Scores can be added; `Score()` is that of no text.

    >>> score = Score(nats=math.log(8) * 10, tokens=10, bytes=15)
    >>> round(score.perplexity, 9), round(score.bits_per_byte, 9)
    (8.0, 2.0)
    """

    nats: float = 0.0  # sum of -ln p
    tokens: int = 0  # predicted, so without the begin id
    bytes: int = 0  # of the text in UTF-8
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        """e to the nats per token; infinite where that is more than a float can hold."""
        rate = self.nats / self.tokens
        return math.exp(rate) if rate < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The bits that an ideal coder with this model needs, comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: "Score") -> "Score":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Score(*(a + b for a, b in zip(mine, others, strict=True)))

    def as_dict(self) -> dict[str, float]:
        return {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte} | dataclasses.asdict(self)


@torch.inference_mode()
def negative_log_likelihood(
    model: Mixtral,
    ids: list[int],
    window: int,
    stride: int,
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[int], object] | None = None,
    kv_bits: int = 16,
    passes: Passes | None = None,
) -> float:
    """The sum over ids[1:] of -ln p(id | ids before it), in nats, with up to `window` tokens in view.

    Windows start `stride` tokens apart. Each counts only the tokens that the one before did not reach, so all
    but those of the first have more than `window - stride` tokens in view. Tokens go through the model
    `chunk` at a time, so no more than [chunk, V] logits exist at once. `progress` is called with each number
    of predicted ids. Keys and values are kept in `kv_bits`. `passes` computes instead of `model` alone.
    Raises `RequestError` if a logit is not finite.
    """
    device = model.device
    kv = KVCache.allocate(model.config, 1, min(window, len(ids)), model.dtype, device, kv_bits)
    passes = passes or Here(model, None, device)
    text = torch.tensor(ids, device=device)
    total, under_way = 0.0, deque[tuple[Piece, Pass]]()

    def finish() -> None:
        nonlocal total
        piece, finished = under_way.popleft()
        logits = finished().float()  # [b - a, V]
        if not piece.scored:
            return
        a, b = piece.begin, piece.end
        nats = F.cross_entropy(logits, text[a + 1 : b + 1], reduction="none")  # [b - a]
        total += nats.double().sum().item()
        if not math.isfinite(total):
            raise RequestError(
                f"logits after tokens {a} to {b - 1} are not finite; compute with --dtype float32, "
                "and if that does not help, the checkpoint is damaged"
            )
        if progress:
            progress(b - a)

    for piece in pieces(len(ids), window, stride, chunk):
        past = piece.begin - piece.start
        begun = passes.begin(ids[piece.begin : piece.end], kv, past, last=not piece.scored)
        under_way.append((piece, begun))
        if len(under_way) == passes.depth:
            finish()
    while under_way:
        finish()
    return total


def score(
    engine: Engine,
    text: str,
    window: int,
    stride: int,
    progress: Callable[[int], object] | None = None,
) -> Score:
    """How well the engine's model predicts a text after a begin id. For the other arguments see
    `negative_log_likelihood`.

    Raises `RequestError` for a text without a token.
    """
    ids = engine.tokenizer.encode(text)
    if len(ids) < 2:
        raise RequestError(f"the text of {len(text)} characters comes to no token; give one with words in it")
    began = time.perf_counter()
    with engine.runner.working():
        nats = engine.runner.alone(
            lambda: negative_log_likelihood(
                engine.model,
                ids,
                window,
                stride,
                PREFILL_CHUNK,
                progress,
                engine.plan.kv,
                engine.runner.passes,
            )
        )
    return Score(nats, len(ids) - 1, len(text.encode()), time.perf_counter() - began)


def read_text(path: Path) -> str:
    """A file's text with its line ends. Raises `RequestError` if it is empty or not UTF-8."""
    data = path.read_bytes()
    if not data:
        raise RequestError(f"{path} is empty; give a file with text in it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error


def main(argv: list[str] | None = None) -> int:
    return run(lambda: measure(argv))


def measure(argv: list[str] | None) -> None:
    """Do what the command line asks. Every failure is raised."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        options = from_flags(EngineOptions, args)
        check_window(args.window, args.stride, options.context)
    except OptionError as error:
        parser.error(str(error))
    with ending_together(options) as rank:
        if rank:
            follow(str(args.model), dataclasses.replace(options, context=options.context or args.window))
            return
        report = make_report(args, options)
        put((json.dumps(report, indent=2) if args.json else as_text(report)) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("tools.perplexity", __doc__)
    parser.add_argument(
        "model", type=Path, nargs="?", default=DEMO, help=f"{MODEL_HELP} (default: the demo model)"
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help="UTF-8 files"
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="most tokens in view at once (default: --context, which is 4096 or the model's limit)",
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from window to window (default: half the window)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, EngineOptions)
    return parser


def check_window(window: int | None, stride: int | None, context: int | None) -> None:
    """Raises `OptionError` for values that suit no model."""
    if window is not None and window < 2:
        raise OptionError(f"--window is {window}, and must be at least 2")
    if window is not None and context is not None and window > context:
        raise OptionError(f"--window is {window}, and must be at most the --context of {context}")
    if stride is not None and stride < 1:
        raise OptionError(f"--stride is {stride}, and must be at least 1")
    limit = window or context
    if stride is not None and limit is not None and stride > limit:
        raise OptionError(f"--stride is {stride}, and must be at most the window of {limit}")


def make_report(args: argparse.Namespace, options: EngineOptions) -> dict[str, Any]:
    """Read the texts, load the model, and score them."""
    texts = {str(path): read_text(path) for path in args.text}
    args.model = find_folder(args.model, download_bar)
    checkpoint = open_checkpoint(args.model)
    if args.window is not None and args.window > checkpoint.config.context:
        raise OptionError(
            f"--window is {args.window}, and this model was made for at most {checkpoint.config.context}"
        )
    if options.context is None:
        options = dataclasses.replace(options, context=args.window)
    with Engine.load(args.model, options, byte_bar, kernel_bar) as engine:
        end_when_lost(engine)
        window = args.window or engine.plan.context
        stride = args.stride or window // 2
        check_window(window, stride, None)
        scores = score_all(engine, texts, window, stride)
        return {
            "model": str(args.model),
            "checkpoint": checkpoint.description,
            **{kind: str(spec) for kind, spec in checkpoint.formats.by_kind().items()},
            "dtype": str(engine.dtype).removeprefix("torch."),
            "device": str(engine.device),
            "kv": engine.plan.kv,
            "window": window,
            "stride": stride,
            **sum(scores.values(), Score()).as_dict(),
            "texts": {name: one.as_dict() for name, one in scores.items()},
        }


def score_all(engine: Engine, texts: dict[str, str], window: int, stride: int) -> dict[str, Score]:
    """Score each text, showing progress."""
    total = sum(len(engine.tokenizer.encode(text)) - 1 for text in texts.values())
    scores = {}
    with progress(total, "scoring", " tokens") as advance:
        for name, text in texts.items():
            try:
                scores[name] = score(engine, text, window, stride, progress=advance)
            except RequestError as error:
                raise RequestError(f"{name}: {error}") from error
    return scores


def as_text(report: dict[str, Any]) -> str:
    """The report for people: a line per text, one for all of them, and how it was measured."""
    rows = dict(report["texts"])
    if len(rows) > 1:
        rows["all"] = report
    width = max(map(len, rows))
    lines = [f"{'':{width}}      tokens       bytes  perplexity  bits per byte"]
    lines += [
        f"{name:{width}}  {row['tokens']:10,}  {row['bytes']:10,}  {row['perplexity']:10.4f}"
        f"  {row['bits_per_byte']:13.4f}"
        for name, row in rows.items()
    ]
    lines.append(
        f"{report['checkpoint']}, in {report['dtype']} on {report['device']}; window {report['window']}, "
        f"stride {report['stride']}; {report['seconds']:.1f} s"
    )
    return "\n".join(lines)
