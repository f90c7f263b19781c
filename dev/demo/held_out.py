"""How well a model predicts text that it has not seen, in bits per byte.

    python -m dev.demo.held_out [MODEL]

This judges a model (default: the demo) on the files of the standard library that the demo was not trained on,
and compresses the same files with xz -9 for comparison. The files are those of the running Python. The
held-out files of another version than 3.11.7 are not all unseen.
"""

import lzma
import math
import sys
from pathlib import Path
from typing import Protocol

from dev.demo.balance import Balance
from dev.demo.corpus import standard_library
from model.mixtral import Mixtral
from runtime import Engine, EngineOptions
from runtime.engine import DEMO
from runtime.shell.arguments import new_parser
from runtime.shell.command import run
from tools.perplexity import negative_log_likelihood


class Encoder(Protocol):
    """Turns text into ids: our tokenizer, or sentencepiece's."""

    def encode(self, text: str) -> list[int]: ...


def judge(model: Mixtral, balance: Balance, encoder: Encoder, texts: list[str]) -> str:
    """Bits per byte of texts, each after a begin id, and how evenly they use the experts."""
    balance.busiest()
    window = model.config.context
    ids = [encoder.encode(text) for text in texts]
    ids = [i if i[:1] == [model.config.bos_id] else [model.config.bos_id, *i] for i in ids]
    nats = sum(negative_log_likelihood(model, i, window, window // 2) for i in ids)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    return f"{bits:.4f} bits per byte, busiest expert {balance.busiest():.2f} times the mean"


def main(argv: list[str] | None = None) -> int:
    return run(lambda: compare(argv))


def compare(argv: list[str] | None) -> None:
    """Print what xz and the model on the command line make of the held-out files."""
    parser = new_parser("dev.demo.held_out", __doc__)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    args = parser.parse_args(argv)
    corpus = standard_library()
    data = corpus.held_out_bytes
    print(f"{len(corpus.held_out)} files, {len(data):,} bytes, Python {sys.version.split()[0]}")
    print(f"xz -9    {len(lzma.compress(data, preset=9)) * 8 / len(data):.4f} bits per byte", flush=True)
    engine = Engine.load(args.model, EngineOptions(dtype="float32"))
    print(f"model    {judge(engine.model, Balance(engine.model), engine.tokenizer, corpus.held_out)}")


if __name__ == "__main__":
    sys.exit(main())
